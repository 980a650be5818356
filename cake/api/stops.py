"""Texts at which an answer ends, found also where they straddle tokens."""

from collections.abc import Sequence


class StopFinder:
    """Passes an answer's text on until one of the stops comes, and holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = stops, ""
        self.found: str | None = None  # the one that came

    def feed(self, text: str) -> str:
        """The text that is certain now; of what comes once one was found, nothing."""
        if self.found:
            return ""
        self._held += text
        ends = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            end, self.found = min(ends)
            return self._held[:end]
        held_back = max((_beginning(self._held, stop) for stop in self._stops), default=0)
        certain, self._held = (
            self._held[: len(self._held) - held_back],
            self._held[len(self._held) - held_back :],
        )
        return certain

    def finish(self) -> str:
        """What was held back, at the answer's end."""
        return "" if self.found else self._held


def _beginning(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the first of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
