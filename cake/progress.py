"""The bars that show how far something is. They make way for what is told meanwhile."""

import contextlib
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from cake.terminal import making_way

DELAY_S = 2.0


def loading_bar(total: int) -> "contextlib.AbstractContextManager[tqdm[Any]]":
    """For so many bytes, with their rate."""
    return _bar(total=total, desc="loading", unit="B", unit_scale=True)


def prompt_bar(total: int) -> "contextlib.AbstractContextManager[tqdm[Any]]":
    """For so many tokens of a prompt."""
    return _bar(total=total, desc="prompt", unit="token")


@contextlib.contextmanager
def _bar(**options: Any) -> "Iterator[tqdm[Any]]":
    """It shows itself after a delay, and again with the progress after a line was told."""

    def make_way() -> None:
        if not bar.disable and bar.last_print_t >= bar.start_t + DELAY_S:  # it has shown itself
            bar.clear()

    with tqdm(delay=DELAY_S, leave=False, **options) as bar, making_way(make_way):
        yield bar
