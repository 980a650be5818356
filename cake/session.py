"""A session on the master: the token ids of one sequence, and how many of them the stages hold."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Session:
    """One sequence on the master: its token ids, and how many of them every stage holds."""

    ids: list[int] = field(default_factory=list)
    held: int = 0
    number: int = field(default_factory=itertools.count().__next__)  # unique in this process

    def keep_prefix(self, ids: Sequence[int]) -> None:
        """Become the sequence `ids`; what it shares with the old one need not be run again."""
        shared = 0
        while shared < min(self.held, len(ids) - 1) and self.ids[shared] == ids[shared]:
            shared += 1
        self.ids, self.held = list(ids), shared

    def cut(self, length: int) -> None:
        """Forget what lies beyond the first `length` tokens."""
        self.ids, self.held = self.ids[:length], min(self.held, length)
