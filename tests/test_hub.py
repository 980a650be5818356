"""Models from the hub, spoken to over HTTP: a small one on loopback stands in for it."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from conftest import make_tiny_llama

from cake.weights.hub import is_hub_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ANYTHING = "lambda name: True"
# A subprocess, because huggingface_hub reads its settings when it is imported.
CLIENT = """
import sys
from cake.errors import CheckpointError
from cake.weights.hub import fetch_model
try:
    print(fetch_model(sys.argv[1], eval(sys.argv[2])))
except CheckpointError as error:
    print(error)
    sys.exit(2)
"""


class FakeHub(ThreadingHTTPServer):
    """Serves folders as models; what it refuses, it refuses as the real one does."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models: dict[str, Path] = {}
        self.refusals: dict[str, tuple[int, str]] = {}  # model -> status and error code, of everything
        self.file_refusals: dict[str, tuple[int, str]] = {}  # the same, of its files only
        self.downloads: list[str] = []
        self.hangs_up = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """As much of the hub's API as `snapshot_download` speaks."""

    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        if self.server.hangs_up:
            self.close_connection = True
            return
        parts = self.path.partition("?")[0].strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        model, rest = "/".join(parts[:2]), parts[2:]
        refusal = self.server.refusals.get(model) or (not is_api and self.server.file_refusals.get(model))
        if refusal:
            self.refuse(*refusal)
        elif model not in self.server.models:
            self.refuse(404, "RepoNotFound")
        elif is_api:
            self.answer_api(model, rest)
        else:
            self.send_file(model, "/".join(rest[2:]))  # resolve/<commit>/<path>

    def answer_api(self, model: str, rest: list[str]) -> None:
        if rest[:1] == ["tree"]:
            files = sorted(p for p in self.server.models[model].iterdir())
            listing = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": etag(p)} for p in files
            ]
            self.send(200, json.dumps(listing).encode())
        else:
            self.send(200, json.dumps({"id": model, "sha": COMMIT, "siblings": []}).encode())

    def send_file(self, model: str, name: str) -> None:
        path = self.server.models[model] / name
        if not path.is_file():
            self.refuse(404, "EntryNotFound")
            return
        if self.command == "GET":
            self.server.downloads.append(name)
        self.send(200, path.read_bytes(), **{"ETag": f'"{etag(path)}"', "X-Repo-Commit": COMMIT})

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"", **{"X-Error-Code": code, "X-Error-Message": "Refused."})

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_llama(tmp_path_factory.mktemp("hub"), num_hidden_layers=3, shard_size="100KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("# not needed")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle, never asked for")
    return folder


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


Fetch = Callable[..., tuple[int, str]]


@pytest.fixture
def fetch(tmp_path: Path) -> Fetch:
    """Runs `fetch_model` against a hub: exit code, and the folder or the error's message."""

    def run(url: str, model: str, wanted: str = ANYTHING) -> tuple[int, str]:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        environment.pop("HF_HUB_CACHE", None)
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, model, wanted],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "Traceback" not in done.stderr, done.stderr
        lines = done.stdout.splitlines()
        assert len(lines) == 1, done.stdout
        return done.returncode, lines[0]

    return run


def test_only_wanted_shards_are_downloaded(hub: FakeHub, fetch: Fetch, sharded: Path) -> None:
    hub.models["org/tiny"] = sharded
    weight_map = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    wanted = {file for name, file in weight_map.items() if name.startswith("model.layers.1.")}
    assert 0 < len(wanted) < len(set(weight_map.values()))
    code, folder = fetch(hub.url, "org/tiny", "lambda name: name.startswith('model.layers.1.')")
    assert code == 0
    small = {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert sorted(hub.downloads) == sorted(small | wanted)
    assert {path.name for path in Path(folder).iterdir()} == small | wanted
    for name in small | wanted:
        assert (Path(folder) / name).read_bytes() == (sharded / name).read_bytes()
    # Another node's part comes on top; what is there already is not downloaded again.
    first = set(hub.downloads)
    code, again = fetch(hub.url, "org/tiny")
    assert (code, again) == (0, folder)
    assert sorted(hub.downloads) == sorted(first | set(weight_map.values()))


def test_nothing_wanted(hub: FakeHub, fetch: Fetch, sharded: Path) -> None:
    hub.models["org/tiny"] = sharded
    assert fetch(hub.url, "org/tiny", "lambda name: False")[0] == 0
    assert not [name for name in hub.downloads if name.endswith(".safetensors")]
    assert "config.json" in hub.downloads


def test_single_file_model_and_a_hub_that_goes_away(hub: FakeHub, fetch: Fetch, tiny_model: Path) -> None:
    hub.models["org/tiny"] = tiny_model
    code, folder = fetch(hub.url, "org/tiny")
    assert code == 0
    assert sorted(hub.downloads) == ["config.json", "generation_config.json", "model.safetensors"]
    assert fetch(closed_port(), "org/tiny") == (0, folder)  # the cache has it all


def closed_port() -> str:
    """A URL where nothing listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def test_hub_out_of_reach(fetch: Fetch) -> None:
    code, message = fetch(closed_port(), "org/tiny")
    assert code == 2
    assert message == "'org/tiny' is no folder here, and the Hugging Face hub cannot be reached"


def test_hub_that_goes_away_before_all_is_there(hub: FakeHub, fetch: Fetch, sharded: Path) -> None:
    hub.models["org/tiny"] = sharded
    fetch(hub.url, "org/tiny", "lambda name: 'layers.1.' in name")
    code, message = fetch(closed_port(), "org/tiny")
    assert code == 2
    assert "'org/tiny'" in message
    assert "cannot be reached" in message


def test_hub_that_hangs_up(hub: FakeHub, fetch: Fetch) -> None:
    hub.hangs_up = True
    code, message = fetch(hub.url, "org/tiny")
    assert code == 2
    assert "'org/tiny'" in message


def test_unknown_model(hub: FakeHub, fetch: Fetch) -> None:
    code, message = fetch(hub.url, "org/none")
    assert code == 2
    assert message.startswith("'org/none' is no folder here, and the Hugging Face hub has no such model")


def test_unknown_model_as_the_hub_says_it_without_a_login(hub: FakeHub, fetch: Fetch) -> None:
    """huggingface.co answers 401 then, so that nobody learns which private models there are."""
    hub.refusals["org/none"] = (401, "RepoNotFound")
    code, message = fetch(hub.url, "org/none")
    assert code == 2
    assert "has no such model" in message


@pytest.mark.parametrize("status", [401, 403])
def test_gated_model(status: int, hub: FakeHub, fetch: Fetch, tiny_model: Path) -> None:
    hub.models["org/gated"] = tiny_model
    hub.file_refusals["org/gated"] = (status, "GatedRepo")
    code, message = fetch(hub.url, "org/gated")
    assert code == 2
    assert "gives 'org/gated' only to those who were granted access" in message
    assert "hf auth login" in message


@pytest.mark.parametrize("index", ["{", "{}", "[]", '{"weight_map": []}'])
def test_broken_index(index: str, hub: FakeHub, fetch: Fetch, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    (folder / "model.safetensors.index.json").write_text(index)
    hub.models["org/broken"] = folder
    code, message = fetch(hub.url, "org/broken")
    assert code == 2
    assert message.startswith("'org/broken' could not be downloaded: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("meta-llama/Meta-Llama-3-8B", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("o/m", True),
        ("org_1/m.v2", True),
        ("gpt2", False),
        ("", False),
        ("/models/llama", False),
        ("./llama", False),
        ("../llama", False),
        ("~/llama", False),
        ("a/b/c", False),
        ("org/", False),
        ("/name", False),
        ("org/na me", False),
        ("org\\name", False),
        ("org/name\n", False),
    ],
)
def test_is_hub_id(text: str, expected: bool) -> None:
    assert is_hub_id(text) == expected
