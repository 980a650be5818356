"""A session on the master: the token ids of one sequence, and how many of them the stages hold."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

FAR = 16  # tokens


class Kept(NamedTuple):
    """The stages from `block` on hold more of a session than those before: its first `n_tokens`."""

    n_tokens: int
    block: int


@dataclass(eq=False)
class Session:
    """One sequence on the master: its token ids, and how many of them every stage holds.

    With a `source`, the number of another session, the stages hold none of its own yet but are to
    begin with a copy of that one's first `held` tokens.
    """

    ids: list[int] = field(default_factory=list)
    held: int = 0
    number: int = field(default_factory=itertools.count().__next__)  # unique in this process
    source: int | None = None
    kept: Kept | None = None  # by some of the stages, beyond what all hold
    lost_at: int | None = None  # its length when the stages were last found to hold nothing of it

    def shared(self, ids: Sequence[int]) -> int:
        """How many of `ids` need not be run again: not the last, whose logits are wanted."""
        shared, most = 0, min(self.held, len(ids) - 1)
        while shared < most and self.ids[shared] == ids[shared]:
            shared += 1
        return shared

    def keep_prefix(self, ids: Sequence[int]) -> None:
        """Become the sequence `ids`; what it shares with the old one need not be run again."""
        self.ids, self.held, self.kept = list(ids), self.shared(ids), None

    def copy(self, n_tokens: int) -> "Session":
        """Another session that begins with the first `n_tokens` of this one."""
        return Session(self.ids[:n_tokens], n_tokens, source=self.number)

    def cut(self, length: int) -> None:
        """Forget what lies beyond the first `length` tokens."""
        self.ids, self.held, self.kept = self.ids[:length], min(self.held, length), None

    def holds(self, n_tokens: int) -> None:
        """All stages hold so many tokens of it, those that are only proposed not counted."""
        self.held, self.source = min(n_tokens, len(self.ids)), None
        if self.kept is not None and self.held >= self.kept.n_tokens:
            self.kept = None

    def lose_before(self, block: int) -> None:
        """The stages before `block` may hold nothing of it any more; those behind hold what they held."""
        before = self.kept or Kept(self.held, block)
        n_tokens = min(before.n_tokens, len(self.ids) - 1)  # the last one's logits are wanted
        self.held, self.kept = 0, Kept(n_tokens, max(before.block, block)) if n_tokens else None

    def lose(self) -> bool:
        """The stages hold nothing of it any more; whether that comes again before it has got far."""
        again = self.lost_at is not None and len(self.ids) - self.lost_at < FAR
        self.held, self.source, self.kept, self.lost_at = 0, None, None, len(self.ids)
        return again
