"""What a stage did, counted where it is done, and shown wherever somebody looks at it."""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple


class Span(NamedTuple):
    """A batch that a stage computed; `started_s` is on the clock of this process."""

    started_s: float
    compute_s: float
    n_tokens: int


@dataclass
class StageStats:
    """What a stage did since it was opened. `network_s` is waiting that was not computing.

    Where there are `spans`, each batch is kept in them.
    """

    messages: int = 0
    passes: int = 0  # batches that were computed
    tokens: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    compute_s: float = 0.0
    network_s: float = 0.0
    spans: deque[Span] | None = None

    def computed(self, span: Span) -> None:
        """Count a batch."""
        self.passes += 1
        self.tokens += span.n_tokens
        self.compute_s += span.compute_s
        if self.spans is not None:
            self.spans.append(span)
