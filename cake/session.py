"""A session on the master: the token ids of one sequence, and how many of them the stages hold."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

FAR = 16  # tokens


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
    lost_at: int | None = None  # its length when the stages were last found to hold nothing of it

    def shared(self, ids: Sequence[int]) -> int:
        """How many of `ids` need not be run again: not the last, whose logits are wanted."""
        shared, most = 0, min(self.held, len(ids) - 1)
        while shared < most and self.ids[shared] == ids[shared]:
            shared += 1
        return shared

    def keep_prefix(self, ids: Sequence[int]) -> None:
        """Become the sequence `ids`; what it shares with the old one need not be run again."""
        self.ids, self.held = list(ids), self.shared(ids)

    def copy(self, n_tokens: int) -> "Session":
        """Another session that begins with the first `n_tokens` of this one."""
        return Session(self.ids[:n_tokens], n_tokens, source=self.number)

    def cut(self, length: int) -> None:
        """Forget what lies beyond the first `length` tokens."""
        self.ids, self.held = self.ids[:length], min(self.held, length)

    def lose(self) -> bool:
        """The stages hold nothing of it any more; whether that comes again before it has got far."""
        again = self.lost_at is not None and len(self.ids) - self.lost_at < FAR
        self.held, self.source, self.lost_at = 0, None, len(self.ids)
        return again
