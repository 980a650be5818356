"""`--chat`: a prompt line, streamed answers, and a history that is never computed twice."""

import asyncio
import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator

from prompt_toolkit import PromptSession
from prompt_toolkit.patch_stdout import patch_stdout

from cake.errors import CakeError, PromptTooLongError
from cake.generator import Generator
from cake.master import Master, message
from cake.report import Answer, closing_lines
from cake.session import Session
from cake.status_line import status_line
from cake.terminal import end_text, note_interrupt, one_terminal, show_text, tell

log = logging.getLogger(__name__)

Message = dict[str, str]


async def run_chat(master: Master, generator: Generator) -> None:
    """Talk until Ctrl-D or the end of the input. Ctrl-C stops an answer.

    So does an error. In both cases the history keeps what was shown, as the person has read it; a line
    to which nothing was said because of an error is dropped.
    """
    session = Session()
    history = master.system_messages()
    lines = _Lines()
    if master.raw:
        tell("without a chat template, each line continues the text so far")
    tell("Ctrl-C stops an answer, Ctrl-D leaves")
    while (line := await lines.next()) is not None:
        if not line.strip():
            continue
        n_before = len(session.ids)
        history.append(message("user", line))
        try:
            prompt = _prompt(master, generator, session, history)
        except CakeError as error:
            tell(f"{error}; this line was not sent")
            history.pop()
            continue
        answer = await _answer(master, generator, session, prompt)
        if answer.error and not answer.token_ids:
            tell(f"Error: {answer.error}; this line is forgotten")
            history.pop()
            if master.raw:
                session.cut(n_before)
            continue
        end_text()
        history.append(message("assistant", answer.text))
        tell(closing_lines(answer, generator.pipeline).splitlines()[0])
        if answer.error:
            tell(f"Error: {answer.error}; the chat goes on with what there is of this answer")


async def _answer(master: Master, generator: Generator, session: Session, prompt: list[int]) -> Answer:
    """Show the answer, as far as it comes."""
    answer = Answer(len(prompt))
    answering = asyncio.create_task(master.answer(generator, session, prompt, show_text, answer))
    try:
        async with status_line(generator, master.model_name):
            with _interrupting(answering), contextlib.suppress(asyncio.CancelledError):
                await answering
    except CakeError:
        log.debug("the whole story", exc_info=True)
    return answer


def _prompt(master: Master, generator: Generator, session: Session, history: list[Message]) -> list[int]:
    """Token ids up to the answer to the history's last line; forgets the oldest turns if it must."""
    line = history[-1]["content"]
    if master.raw and session.ids:
        prompt = session.ids + master.tokenizer.encode(f"\n{line}\n", start=False)
    else:
        prompt = master.encode(line) if master.raw else master.tokenizer.encode_chat(history)
    try:
        generator.check(prompt)
    except PromptTooLongError:
        turns = [index for index, each in enumerate(history) if each["role"] == "user"]
        if master.raw or len(turns) == 1:
            raise
        tell("(the context is full: the oldest question and its answer are forgotten)")
        del history[turns[0] : turns[1]]
        return _prompt(master, generator, session, history)
    return prompt


class _Lines:
    """What the person types; plain lines when the input is a pipe."""

    def __init__(self) -> None:
        self._prompt: PromptSession[str] | None = None
        self._plain: asyncio.Queue[str] = asyncio.Queue()
        if sys.stdin.isatty() and sys.stdout.isatty():
            self._prompt = PromptSession()
        else:
            # A daemon: a thread that waits for a line would keep a program from ending.
            threading.Thread(target=self._read, args=[asyncio.get_running_loop()], daemon=True).start()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            while line := sys.stdin.readline():
                loop.call_soon_threadsafe(self._plain.put_nowait, line)
            loop.call_soon_threadsafe(self._plain.put_nowait, "")

    async def next(self) -> str | None:
        """The next line; none at the end."""
        if self._prompt is None:
            line = await self._plain.get()
            return line.rstrip("\n") if line else None
        while True:
            try:
                with _above_the_prompt():
                    return await self._prompt.prompt_async("> ")
            except KeyboardInterrupt:
                continue  # an empty line again, as in a shell
            except EOFError:
                return None


def _above_the_prompt() -> contextlib.AbstractContextManager[None]:
    """While this lasts, log lines appear above the line that is being typed."""
    return patch_stdout(raw=True) if one_terminal() else contextlib.nullcontext()


@contextlib.contextmanager
def _interrupting(task: "asyncio.Task[None]") -> Iterator[None]:
    """While this lasts, Ctrl-C cancels the task instead of the program."""
    loop = asyncio.get_running_loop()

    def interrupt(*_: object) -> None:
        note_interrupt()
        loop.call_soon_threadsafe(task.cancel)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
