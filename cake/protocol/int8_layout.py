"""How hidden states in int8 lie in a message: what of them is where, and how many bytes it takes."""

import math
from typing import NamedTuple

from cake.errors import ProtocolError

GROUP = 64  # consecutive channels of a row that have a scale in common
MOST_EXACT = 8  # channels of a row, the largest, that are kept in bfloat16
LONGEST_ROW = 2**16  # channels are named in 16 bits


class Int8Layout(NamedTuple):
    """What an int8 tensor's bytes are, for `rows` rows of `width` channels.

    One after the other: `[rows, groups]` scales, bfloat16; `[rows, exact]` channels, unsigned of 16 bits,
    and their values, bfloat16; `[rows, width]` values, signed of 8 bits, in units of their group's scale.
    """

    rows: int
    width: int
    groups: int
    exact: int

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> "Int8Layout":
        """Of a tensor of this shape, whose last dimension is a row; raises `ProtocolError`."""
        *others, width = shape or (1,)
        if width > LONGEST_ROW:
            raise ProtocolError(f"rows of {width!r:.60} channels are too long for int8")
        return cls(math.prod(others), width, -(-width // GROUP), min(MOST_EXACT, width // 8))

    @property
    def n_bytes(self) -> int:
        """Of all of it; for no width more than 4 a channel, as in float32."""
        return self.rows * (2 * self.groups + 4 * self.exact + self.width)
