"""The page in a real browser, over a real cluster of two workers, one of which is killed and comes back."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from chromium import launched, needs_chromium
from conftest import CakeProcess
from real_processes import GREEDY, start_workers

WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
SCRIPT = "<script>alert(1)</script>"

pytestmark = [needs_chromium, pytest.mark.xdist_group("page")]  # one browser, one cluster

# The contrast of each text with the nearest ground behind it, as WCAG 2 reckons it, where it is below 4.5.
FAINT_TEXTS = """() => {
  const channel = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = parts(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.checkVisibility()) continue;
    const [a, b] = [light(parts(getComputedStyle(node).color)), light(ground(node))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) found.push(`${node.tagName}.${node.className}: ${contrast.toFixed(2)}`);
  }
  return found;
}"""


class Running(NamedTuple):
    """Where the page is, and the two workers, of which one can be started again."""

    url: str
    workers: list[CakeProcess]
    start_again: Callable[[int], CakeProcess]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two real workers, and a server that has the last blocks."""
    started: list[CakeProcess] = []

    def start(*arguments: object) -> CakeProcess:
        started.append(CakeProcess(*arguments))
        return started[-1]

    served = start_workers(start, tmp_path_factory.mktemp("page"), "0-14", "15-24")
    server = start("--topology", served.topology, "--api", "127.0.0.1:0", "--context", 1024, *GREEDY)
    hosts = [node["host"] for node in json.loads(served.topology.read_text()).values()]

    def start_again(i: int) -> CakeProcess:
        options = ("--mode", "worker", "--topology", served.topology, "--dtype", "float32")
        return start(*options, "--name", f"worker{i}", "--address", hosts[i])

    try:
        url = server.wait_for(r"(http://127\.0\.0\.1:\d+)/v1")[1]
        yield Running(url, served.workers, start_again)
    finally:
        for process in started:
            process.process.kill()
            process.finish()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, cluster: Running) -> Iterator[Any]:
    """The page, freshly opened; whatever its console calls an error is one."""
    context = browser.new_context(viewport=WIDE)
    page, errors = context.new_page(), []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(cluster.url)
    page.wait_for_selector("#state:text-is('3 of 3 nodes up')")
    yield page
    context.close()
    assert errors == []


def ask(page: Any, text: str) -> Any:
    """Send a message; its answer, which may still be coming: until it is there, #send is hidden."""
    page.fill("#question", text)
    page.press("#question", "Enter")
    return page.locator("#messages .assistant").last


def test_an_answer_streams_and_is_kept_and_asked_for_again(page: Any) -> None:
    ask(page, "Name three colours.")
    page.wait_for_selector("#send:visible")
    answer = page.inner_text("#messages .assistant .body")
    assert answer
    assert "tokens/s" in page.inner_text("#messages .assistant .note")
    page.click("text=Retry")
    page.wait_for_selector("#send:visible")
    assert page.inner_text("#messages .assistant .body") == answer
    page.reload()
    page.wait_for_selector("#messages .assistant")
    assert page.inner_text("#messages .assistant .body") == answer


def test_a_conversation_is_listed_at_once_and_keeps_what_has_come_when_the_page_is_left(page: Any) -> None:
    ask(page, "Tell me a very long story about the sea.")
    assert page.inner_text("#conversations [aria-current]").startswith("Tell me a very long story")
    page.wait_for_selector("#messages .assistant .body:not(:empty)")
    come = page.inner_text("#messages .assistant .body")
    page.reload()
    page.wait_for_selector("#messages .assistant")
    assert page.inner_text("#messages .assistant .body").startswith(come)
    assert "broken off" in page.inner_text("#messages .assistant .note")
    assert page.locator("#messages .fault").count() == 0
    assert page.locator("#conversations li").count() == 1
    page.click("text=Retry")
    page.wait_for_selector("#stop:visible")
    page.keyboard.press("Escape")
    page.wait_for_selector("#messages .note:has-text('stopped')")


def test_a_deleted_conversation_can_be_had_back_by_keyboard(page: Any) -> None:
    kept = [
        {"id": title, "messages": [{"role": "user", "content": title}]} for title in ("One", "Two", "Three")
    ]
    page.evaluate("kept => localStorage.setItem('cake.conversations', kept)", json.dumps(kept))
    page.reload()
    titles = page.locator("#conversations li")
    page.focus("[aria-label='Delete Two']")
    page.keyboard.press("Enter")
    assert titles.all_inner_texts() == ["One\n×", "Two\nUndo", "Three\n×"]
    page.keyboard.press("Enter")  # the focus is on what takes it back
    assert titles.all_inner_texts() == ["One\n×", "Two\n×", "Three\n×"]
    assert page.evaluate("document.activeElement.textContent") == "Two"
    page.click("[aria-label='Delete One']")  # which is open
    assert page.inner_text("#messages").startswith("Ask")
    page.click("text=Undo")
    assert page.inner_text("#messages .user .body") == "One"
    page.click("[aria-label='Delete Three']")
    page.click("[aria-label='Delete One']")
    assert titles.all_inner_texts() == ["One\nUndo", "Two\n×"]
    page.click("text=New chat")
    assert titles.all_inner_texts() == ["Two\n×"]
    page.reload()
    page.wait_for_selector("#conversations li")
    assert titles.all_inner_texts() == ["Two\n×"]


def test_a_conversation_that_is_deleted_while_it_is_answered_stays_away(page: Any) -> None:
    ask(page, "Tell me a very long story about the sea.")
    page.wait_for_selector("#messages .assistant .body:not(:empty)")
    page.click("[aria-label^='Delete Tell me']")
    page.wait_for_selector("#send:visible")
    assert page.locator("#conversations li:not(.deleted)").count() == 0
    page.click("text=Undo")
    assert "stopped" in page.inner_text("#messages .assistant .note")


def keep_a_long_talk(page: Any) -> None:
    said = [{"role": "assistant", "content": "The sea is large. " * 200}]
    page.evaluate(
        "kept => localStorage.setItem('cake.conversations', kept)",
        json.dumps([{"id": "1", "messages": said}]),
    )
    page.reload()
    page.wait_for_selector("#messages .assistant")


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_no_line_is_cut_at_the_edges_of_the_messages(page: Any, size: Any) -> None:
    page.set_viewport_size(size)
    keep_a_long_talk(page)
    place = page.locator("#messages").bounding_box()
    top, bottom = place["y"], place["y"] + place["height"] - 1
    strips = [{"x": place["x"], "y": y, "width": place["width"] - 20, "height": 1} for y in (top, bottom)]
    show = "shown => { document.querySelector('#messages > li').style.visibility = shown; }"
    for scrolled in range(200, 224, 6):  # of a line's height
        page.evaluate("top => { document.querySelector('#messages').scrollTop = top; }", scrolled)
        with_text = [page.screenshot(clip=strip) for strip in strips]
        page.evaluate(show, "hidden")
        assert with_text == [page.screenshot(clip=strip) for strip in strips]
        page.evaluate(show, "visible")


def test_the_end_of_the_messages_stays_in_view_while_the_question_grows(page: Any) -> None:
    page.set_viewport_size(NARROW)
    keep_a_long_talk(page)
    in_two_frames = """() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => {
      const list = document.querySelector("#messages");
      done([list.scrollTop, list.scrollHeight - list.scrollTop - list.clientHeight]);
    })))"""
    page.fill("#question", "a\n" * 8)
    _, from_end = page.evaluate(in_two_frames)
    assert from_end < 1
    page.evaluate("document.querySelector('#messages').scrollTop = 100")
    page.evaluate(in_two_frames)
    page.fill("#question", "")
    from_top, _ = page.evaluate(in_two_frames)
    assert from_top == 100


def test_an_answer_is_stopped_by_keyboard_and_the_question_edited(page: Any) -> None:
    answer = ask(page, "Tell me a very long story about the sea.").locator(".body")
    page.wait_for_selector("#messages .assistant .body:not(:empty)")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:visible")
    assert "stopped" in page.inner_text("#messages .assistant .note")
    assert answer.inner_text()
    page.click("text=Edit")
    assert page.input_value("#question").startswith("Tell me")
    assert page.locator("#messages .assistant").count() == 0


def test_the_settings_promise_the_same_text_for_the_same_seed_as_far_as_it_goes(page: Any) -> None:
    page.click("text=Settings")
    assert "on a GPU but for rounding" in page.inner_text("#settings label:has([name=seed])")


def test_what_looks_like_html_is_text(page: Any) -> None:
    """What a person writes, and what the model answers, held to it by a grammar."""

    def held(route: Any) -> None:
        schema = {"name": "markup", "schema": {"const": SCRIPT}}
        asked = {
            **route.request.post_data_json,
            "response_format": {"type": "json_schema", "json_schema": schema},
        }
        route.continue_(post_data=json.dumps(asked))

    page.route("**/v1/chat/completions", held)
    ask(page, SCRIPT)
    page.wait_for_selector("#messages .note:has-text('tokens/s')")
    assert page.inner_text("#messages .user .body") == SCRIPT
    assert json.loads(page.inner_text("#messages .assistant .body")) == SCRIPT
    assert page.locator("#messages script").count() == 0
    assert page.title() == "Cake"


def test_code_is_shown_apart_and_as_text(page: Any) -> None:
    kept = [
        {"id": "1", "messages": [{"role": "assistant", "content": f"So:\n```html\n{SCRIPT}\n```\nDone."}]}
    ]
    page.evaluate("kept => localStorage.setItem('cake.conversations', kept)", json.dumps(kept))
    page.reload()
    page.wait_for_selector("#messages .code")
    assert page.inner_text("#messages pre") == SCRIPT
    assert page.inner_text("#messages .code div") == "html\nCopy"
    assert page.locator("#messages script").count() == 0


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("view", ["chat", "cluster"])
def test_texts_can_be_read_and_nothing_is_cut_off(
    page: Any, size: Any, colours: str, view: str, tmp_path: Path
) -> None:
    page.set_viewport_size(size)
    page.emulate_media(color_scheme=colours)
    page.click(f"nav >> text={view.title()}")
    if view == "chat":
        ask(page, "Say hello.")
        page.wait_for_selector("#send:visible")
    else:
        page.wait_for_selector("#pipeline .node >> nth=2")
    page.screenshot(path=tmp_path / f"{view}-{colours}-{size['width']}.png")
    assert page.evaluate(FAINT_TEXTS) == []
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_the_apis_description_can_be_read(page: Any, size: Any, colours: str) -> None:
    page.set_viewport_size(size)
    page.emulate_media(color_scheme=colours)
    page.click("nav >> text=API")
    page.click("text=ChatRequest >> nth=0")
    assert page.locator("#type-ChatRequest").is_visible()
    assert page.evaluate(FAINT_TEXTS) == []
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
    page.click("nav >> text=Cluster")
    page.wait_for_selector("#pipeline .node >> nth=2")


def test_a_killed_worker_is_shown_at_once_and_its_answer_goes_on_when_it_is_back(
    page: Any, cluster: Running
) -> None:
    page.evaluate("localStorage.setItem('cake.settings', JSON.stringify({max_tokens: 120}))")
    page.reload()
    answer = ask(page, "Tell me a very long story about the sea.").locator(".body")
    page.wait_for_selector("#messages .assistant .body:not(:empty)")
    cluster.workers[1].process.kill()
    page.wait_for_selector("#state:text-is('worker1 lost')", timeout=15_000)
    assert "worker1 lost: the answer goes on" in page.inner_text("#delay")
    page.click("nav >> text=Cluster")
    page.wait_for_selector(".node.lost:has-text('worker1')")
    assert page.locator("#pipeline .cells i").count() == 30
    assert page.locator(".node.active").count() == 0
    arrows = page.locator("#pipeline .arrow").all_inner_texts()
    assert [text.strip() for text in arrows] == ["waits", "waits for worker1", "waits"]
    cluster.start_again(1)
    page.wait_for_selector("#log:has-text('worker1 has what it lacked')", timeout=60_000)
    happened = [line.split("worker1 ")[1] for line in page.locator("#log li").all_inner_texts()]
    assert happened[::-1] == [
        "is lost",
        "is back",
        "is told again what it lacks",
        "has what it lacked, and goes on",
    ]
    page.wait_for_selector("#state:text-is('3 of 3 nodes up')")
    page.click("nav >> text=Chat")
    page.wait_for_selector("#messages .assistant .note:has-text('120 tokens')")
    assert page.inner_text("#delay") == ""
    with_loss = answer.inner_text()
    page.click("text=Retry")
    page.wait_for_selector("#messages .assistant .note:has-text('120 tokens')")
    assert answer.inner_text() == with_loss


def test_what_is_important_and_code_within_a_line_are_shown_as_such(page: Any) -> None:
    text = f"Use `{SCRIPT}`, **not** 2 * 3 * 4.\n\n```\na\n```\n\nDone."
    kept = [{"id": "1", "messages": [{"role": "assistant", "content": text}]}]
    page.evaluate("kept => localStorage.setItem('cake.conversations', kept)", json.dumps(kept))
    page.reload()
    page.wait_for_selector("#messages strong")
    assert page.inner_text("#messages strong") == "not"
    assert page.inner_text("#messages .body > code") == SCRIPT
    assert "2 * 3 * 4." in page.inner_text("#messages .body")
    assert page.locator("#messages script").count() == 0
