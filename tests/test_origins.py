"""Which pages may ask, and by which names: the decision, and what browsers are told of it."""

import socket

import pytest
from unloaded import client_of, unloaded_app

from cake.api.origins import ANY, Names, Origins, read_origins
from cake.api.server import listen_at, names_of
from cake.errors import CakeError

OTHER = "https://chat.example.org"
ASKED = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-api-key",
}


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        (OTHER, OTHER),
        ("HTTPS://Chat.Example.org/", OTHER),
        ("https://chat.example.org:443", OTHER),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("http://pc:443", "http://pc:443"),
        ("chrome-extension://abcdef", "chrome-extension://abcdef"),
        ("*", "*"),
        ("null", "null"),
    ],
)
def test_origins_are_read_as_browsers_write_them(given: str, origin: str) -> None:
    assert read_origins([given]) == {origin}


@pytest.mark.parametrize(
    "given",
    [
        "",
        "example.org",
        "https://",
        "https://a/b",
        "https://a?b",
        "https://u@a",
        "https://[",
        "https://a:b",
        "//a",
    ],
)
def test_what_is_no_origin_is_refused(given: str) -> None:
    with pytest.raises(CakeError, match="--api-origin"):
        read_origins([given])


@pytest.mark.parametrize("names", ["machine", "network", "any"])
@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8080", "127.0.0.1:8080", "127.1.2.3", "[::1]:8080", "[::1]", "cake.localhost"],
)
def test_this_machines_names_always_lead_here(names: Names, host: str) -> None:
    assert Origins(names=names).answer_to(host)


@pytest.mark.parametrize(
    "host",
    ["192.168.1.20:8080", "[fe80::1]:8080", "mypc", "mypc:8080", "mypc.local", "mypc.lan:80", "pc.fritz.box"],
)
def test_names_of_this_network_lead_here_where_the_network_may_ask(host: str) -> None:
    assert Origins(names="network").answer_to(host)
    assert not Origins(names="machine").answer_to(host)


def test_a_machines_own_name_leads_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "PC.example.org")
    assert Origins(names="network").answer_to("pc.example.org:8080")


@pytest.mark.parametrize("names", ["machine", "network"])
@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "[", ":80"])
def test_a_strangers_name_does_not_lead_here(names: Names, host: str) -> None:
    assert not Origins(names=names).answer_to(host)
    assert not Origins(frozenset({"null", OTHER}), names).answer_to(host)


def test_the_host_of_an_origin_that_may_ask_is_a_name_too() -> None:
    assert Origins(frozenset({OTHER}), "machine").answer_to("chat.example.org")
    assert Origins(frozenset({ANY}), "machine").answer_to("evil.example")


def test_where_a_server_listens_decides_who_may_name_it() -> None:
    with listen_at("127.0.0.1:0") as here, listen_at("0.0.0.0:0") as everywhere:
        assert (names_of(here, None), names_of(everywhere, None)) == ("machine", "network")
        assert names_of(here, "sesame") == names_of(everywhere, "sesame") == "any"


@pytest.mark.parametrize(
    "path", ["/", "/page/main.js", "/docs", "/openapi.json", "/health", "/v1/models", "/no"]
)
async def test_a_strangers_page_is_turned_away_everywhere(path: str) -> None:
    async with client_of(unloaded_app(origins=Origins(names="machine"))) as client:
        for headers, status in (({"Host": "evil.example:8080"}, 421), ({"Origin": OTHER}, 403)):
            answer = await client.get(path, headers=headers)
            assert answer.status_code == status
            assert answer.json()["error"]["code"] in {"unknown_host", "foreign_origin"}
            assert not [name for name in answer.headers if name.startswith("access-control")]
            assert answer.headers["Vary"] == "Origin"
        own = await client.get(path, headers={"Origin": "http://127.0.0.1:8080"})
        assert own.status_code == (404 if path == "/no" else 200)


async def test_a_page_is_not_asked_how_it_would_ask_unless_it_may() -> None:
    async with client_of(unloaded_app(api_key="sesame")) as client:
        answer = await client.options("/v1/models", headers={"Origin": OTHER, **ASKED})
        assert answer.status_code == 403
        assert "Access-Control-Allow-Methods" not in answer.headers


@pytest.mark.parametrize(("allowed", "told"), [(OTHER, OTHER), (ANY, ANY)])
async def test_pages_that_may_ask_are_told_so_before_they_bring_a_key(allowed: str, told: str) -> None:
    async with client_of(unloaded_app("tiny", "sesame", Origins(frozenset({allowed})))) as client:
        answer = await client.options("/v1/chat/completions", headers={"Origin": OTHER, **ASKED})
        assert answer.status_code == 204
        assert answer.headers["Access-Control-Allow-Origin"] == told
        assert answer.headers["Access-Control-Allow-Methods"] == "POST"
        assert answer.headers["Access-Control-Allow-Headers"] == ASKED["Access-Control-Request-Headers"]
        assert answer.headers["Vary"] == "Origin"
        for key, status in (("sesame", 200), ("guessed", 401)):
            headers = {"Origin": OTHER, "Authorization": f"Bearer {key}"}
            answer = await client.get("/v1/models", headers=headers)
            assert answer.status_code == status
            assert answer.headers["Access-Control-Allow-Origin"] == told, "a page must be able to read errors"
            assert answer.headers["Access-Control-Expose-Headers"] == "*"


@pytest.mark.parametrize("origin", ["http://[", "nonsense", "null", "http://127.0.0.1:8081", "\xff"])
async def test_an_origin_that_makes_no_sense_is_a_foreign_one(origin: str) -> None:
    async with client_of(unloaded_app()) as client:
        answer = await client.get("/v1/models", headers={"Origin": origin.encode("latin-1")})
        assert answer.status_code == 403


async def test_options_without_a_page_say_which_methods_there_are() -> None:
    async with client_of(unloaded_app()) as client:
        answer = await client.options("/v1/chat/completions")
        assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
