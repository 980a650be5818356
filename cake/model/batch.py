"""Flat batches: hidden states of many tokens, and the segments that say whose tokens they are.

Rule 1 of the design. A prompt, a chunk of a prompt, one decoded token, drafted tokens to verify and
eight users' next tokens are the same thing: rows, and segments over them.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cake.kernels.block import FusedStep
from cake.model.cache import SessionCache
from cake.model.rope import RopeTable


class Segment(NamedTuple):
    """`length` consecutive tokens of one session, the first of them at `position`.

    Where a `source` is given, the session becomes a copy of that one's first `position` tokens first.
    """

    session: Hashable
    position: int
    length: int
    source: Hashable = None


@dataclass(frozen=True)
class Batch:
    """Hidden states `[n_tokens, hidden_size]`; the segments' lengths add up to `n_tokens`."""

    hidden: Tensor
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class StepSegment:
    """A segment as attention sees it: its rows of the batch, its cache, its causal mask."""

    rows: slice
    position: int
    cache: SessionCache
    mask: Tensor | None  # [group * length, position + length], 0 or -inf; None lets all be seen


@dataclass(frozen=True)
class Step:
    """What all blocks of a stage share while one batch passes through them."""

    cos: Tensor  # [n_tokens, 1, head_dim]
    sin: Tensor
    segments: tuple[StepSegment, ...]

    @classmethod
    def prepare(
        cls,
        hidden: Tensor,
        segments: Sequence[Segment],
        caches: Sequence[SessionCache],
        table: RopeTable,
        group: int,
    ) -> "Step":
        """Positions, masks and caches; `caches` stand in the order of the segments."""
        cos, sin = _rotations(segments, table)
        views, start = [], 0
        for segment, cache in zip(segments, caches, strict=True):
            rows = slice(start, start + segment.length)
            mask = causal_mask(segment.length, segment.position, group, hidden)
            views.append(StepSegment(rows, segment.position, cache, mask))
            start = rows.stop
        return cls(cos, sin, tuple(views))


def cut(segments: Sequence[Segment], most: int) -> Iterator[tuple[slice, list[Segment]]]:
    """The same tokens in parts of at most `most`: each part's rows, and the segments in them."""
    part: list[Segment] = []
    first = end = 0
    for segment in segments:
        done = 0
        while done < segment.length:
            length = min(segment.length - done, most - (end - first))
            part.append(Segment(segment.session, segment.position + done, length))
            done, end = done + length, end + length
            if end - first == most:
                yield slice(first, end), part
                part, first = [], end
    if part:
        yield slice(first, end), part


def fused_step(segments: Sequence[Segment], caches: Sequence[SessionCache], table: RopeTable) -> FusedStep:
    """A step for blocks in the form of Cake's own CPU kernels, which need no masks; `table` is float32."""
    cos, sin = table.up_to(max(segment.position + segment.length for segment in segments))
    rows, first = [], 0
    for segment, cache in zip(segments, caches, strict=True):
        rows.append((first, segment.length, segment.position, cache.storage))
        first += segment.length
    return FusedStep(rows, cos, sin, torch.get_num_threads())


def _rotations(segments: Sequence[Segment], table: RopeTable) -> tuple[Tensor, Tensor]:
    positions = [torch.arange(s.position, s.position + s.length) for s in segments]
    return table.at(positions[0] if len(positions) == 1 else torch.cat(positions))


def causal_mask(length: int, position: int, group: int, like: Tensor) -> Tensor | None:
    """Which keys the tokens at `position ...` may see: all before them and themselves.

    `[group * length, position + length]` in the dtype and on the device of `like`, the same rows
    `group` times over (see `cake.model.llama`); none for a single token, which sees everything.
    """
    if length == 1:
        return None
    hidden_keys = torch.full((length, position + length), float("-inf"), dtype=like.dtype)
    return hidden_keys.triu_(position + 1).repeat(group, 1).to(like.device)
