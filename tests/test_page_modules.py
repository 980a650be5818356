"""What the page draws, by its modules alone, in a real browser: no server runs, and no cluster."""

from collections.abc import Iterator
from typing import Any

import pytest
from chromium import launched, needs_chromium

from cake.api.page_files import FOLDER, HEADERS

pytestmark = [needs_chromium, pytest.mark.xdist_group("page")]
URL = "http://cake.local"


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """An empty page, from whose server the modules come."""

    def answer(route: Any) -> None:
        name = route.request.url.removeprefix(f"{URL}/page/")
        if name == route.request.url:
            route.fulfill(body="<!doctype html>", content_type="text/html", headers=HEADERS)
        else:
            route.fulfill(path=FOLDER / name)

    with launched() as browser:
        page = browser.new_page()
        page.route(f"{URL}/**", answer)
        page.goto(URL)
        yield page


SPANS = {"master": [[0, 2], [9, 24]], "w0": [[2, 9]], "w1": [[24, 30]]}
DRAWN = """async (snapshot) => {
  const { wayOf } = await import("/page/way.js");
  return wayOf(snapshot).map((item) => {
    if (item.matches(".arrow")) return item.textContent;
    const lines = [...item.querySelectorAll("p, b")].map((line) => line.textContent);
    const rows = [...item.querySelectorAll(".cells")].map((cells) => cells.style.gridTemplateColumns);
    return [item.querySelector("h3").firstChild.data, ...lines, ...rows].join("|");
  });
}"""


def snapshot(*way: str, requests: int = 0, lost: str = "", compute_ms: float | None = None) -> Any:
    """Of a cluster whose tokens pass these nodes, each with its next span."""
    spans = {name: iter(spans) for name, spans in SPANS.items()}
    about = {"device": "cpu", "dtype": None, "memory_used": None, "memory_total": None, "address": None}
    nodes = [
        {**about, "name": name, "spans": spans, "holds": [], "state": "lost" if name == lost else "up"}
        for name, spans in SPANS.items()
    ]
    nodes[0]["holds"] = ["embedding", "head"]
    done = {"compute_ms": compute_ms, "network_ms": compute_ms, "bytes_per_s": 2e6, "active": False}
    pipeline = [{**done, "node": name, "span": next(spans[name])} for name in way]
    return {"nodes": nodes, "pipeline": pipeline, "rates": {"requests": requests}}


def test_each_stop_of_a_token_is_drawn_with_what_is_done_there(page: Any) -> None:
    about = "cpu|this server"
    assert page.evaluate(DRAWN, snapshot("master", "w0", "master", "w1")) == [
        f"master|{about}|embedding|blocks 0–1|memory unknown|repeat(2, 11px)",
        "idle",
        f"w0|{about}|blocks 2–8|memory unknown|repeat(7, 11px)",
        "back to the master",
        "master|blocks 9–23|repeat(8, 11px)",
        "idle",
        f"w1|{about}|blocks 24–29|memory unknown|repeat(6, 11px)",
        "back to the master",
        "master|head",
    ]
    assert page.evaluate(DRAWN, snapshot("master", "master", requests=1, compute_ms=1.5)) == [
        f"master|{about}|embedding|head|blocks 0–1, 9–23 · 3.00 ms|memory unknown|"
        "repeat(2, 11px)|repeat(8, 11px)"
    ]


def test_arrows_say_what_travels_or_for_whom_answers_wait(page: Any) -> None:
    def arrows(shown: Any) -> list[str]:
        return page.evaluate(DRAWN, shown)[1::2]

    assert arrows(snapshot("w0", "w1", requests=1, compute_ms=1.5)) == [
        "1.50 ms way2.00 MB/s",
        "1.50 ms way2.00 MB/s",
        "back to the master",
    ]
    assert arrows(snapshot("w0", "w1", lost="w0", requests=1)) == ["waits for w0", "waits", "waits"]
    assert arrows(snapshot("w0", "w1", lost="w0")) == ["idle", "idle", "back to the master"]
    assert arrows(snapshot("w0", "w1", lost="w2", requests=1)) == ["idle", "idle", "back to the master"]


def test_more_than_four_stages_have_lines_of_their_own(page: Any) -> None:
    """Shown in place of a cluster of a master and six workers."""
    stages = [{"node": f"node{i}", "span": [5 * i, 5 * i + 5], "compute_ms": 1.0 + i} for i in range(6)]
    drawn = page.evaluate(
        """async (stages) => {
          const { chart } = await import("/page/chart.js");
          const lines = stages.map(({ node, compute_ms }) => [node, [[-10, compute_ms], [0, compute_ms]]]);
          const shown = [...chart(30, Object.fromEntries(lines)).querySelectorAll("polyline")];
          return shown.map((line) => line.getAttribute("class"));
        }""",
        stages,
    )
    lines, legend = drawn[:6], drawn[6:]
    assert len(set(lines)) == 6
    assert lines == legend


NOTES = """async ([steps, nTokens]) => {
  const { Pace } = await import("/page/pace.js");
  const pace = new Pace(0);
  for (const at of steps) at === "lost" ? pace.interrupt() : pace.piece(at);
  return pace.notes(nTokens ?? undefined).join(" · ");
}"""


@pytest.mark.parametrize(
    ("steps", "n_tokens", "notes"),
    [
        ([], None, ""),
        ([90], None, "1 token · – tokens/s · first after 90 ms"),
        ([90, 190, 290], None, "3 tokens · 10.0 tokens/s · first after 90 ms"),
        ([90, 190, 290], 5, "5 tokens · 20.0 tokens/s · first after 90 ms"),
        ([90, 190, "lost", 60_190, 60_290], None, "4 tokens · 10.0 tokens/s · first after 90 ms"),
        ([90, 190, "lost"], None, "2 tokens · 10.0 tokens/s · first after 90 ms"),
        (["lost", 9_000, 9_100], None, "2 tokens · 10.0 tokens/s · first after 9000 ms"),
        ([90, "lost", 9_000], None, "2 tokens · – tokens/s · first after 90 ms"),
    ],
    ids=str,
)
def test_the_time_an_answer_waited_for_a_lost_worker_does_not_make_it_slow(
    page: Any, steps: list[Any], n_tokens: int | None, notes: str
) -> None:
    assert page.evaluate(NOTES, [steps, n_tokens]) == notes
