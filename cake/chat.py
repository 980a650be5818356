"""`--chat`: a prompt line, streamed answers, and a history that is never computed twice."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Iterator

from prompt_toolkit import PromptSession

from cake.errors import PromptTooLongError
from cake.generator import Generator
from cake.master import Master, message, show_text, tell
from cake.report import Answer, closing_lines
from cake.session import Session


async def run_chat(master: Master, generator: Generator) -> None:
    """Talk until Ctrl-D or the end of the input. Ctrl-C stops an answer."""
    session = Session()
    history = master.system_messages()
    lines = _Lines()
    if master.raw:
        tell("this model has no chat template: every line is continued as it is")
    tell("Ctrl-C stops an answer, Ctrl-D leaves")
    while (line := await lines.next()) is not None:
        if not line.strip():
            continue
        history.append(message("user", line))
        prompt = master.encode(line) if master.raw else master.tokenizer.encode_chat(history)
        answer = Answer(len(prompt))
        try:
            generator.check_prompt(prompt)
        except PromptTooLongError as error:
            tell(f"{error}; this line was not sent")
            history.pop()
            continue
        answering = asyncio.create_task(master.answer(generator, session, prompt, show_text, answer))
        with _interrupting(answering), contextlib.suppress(asyncio.CancelledError):
            await answering
        show_text("\n")
        history.append(message("assistant", answer.text))
        tell(closing_lines(answer, generator.pipeline).splitlines()[0])


class _Lines:
    """What the person types; plain lines when the input is a pipe."""

    def __init__(self) -> None:
        self._prompt: PromptSession[str] | None = None
        if sys.stdin.isatty() and sys.stdout.isatty():
            self._prompt = PromptSession()

    async def next(self) -> str | None:
        """The next line; none at the end."""
        if self._prompt is None:
            line = await asyncio.to_thread(sys.stdin.readline)
            return line.rstrip("\n") if line else None
        while True:
            try:
                return await self._prompt.prompt_async("> ")
            except KeyboardInterrupt:
                continue  # an empty line again, as in a shell
            except EOFError:
                return None


@contextlib.contextmanager
def _interrupting(task: "asyncio.Task[None]") -> Iterator[None]:
    """While this lasts, Ctrl-C cancels the task instead of the program."""
    loop = asyncio.get_running_loop()
    before = signal.signal(signal.SIGINT, lambda *_: loop.call_soon_threadsafe(task.cancel) and None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
