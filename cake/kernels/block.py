"""A transformer block in one call of Cake's own CPU kernels, where cake.model.llama makes thirty of torch's.

Computes the same: activations in float32, caches in float32 or bfloat16, and matrices of any form that
the kernels know.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from cake.kernels import POINTER, SIZE, library
from cake.kernels.matrix import NativeMatrix

MOST_TOKENS = 128  # at once
LEAST_SCRATCH, SCRATCH_SHARE = (
    2 << 20,
    32,
)  # bytes between products: this, or a part of the weights
HEAD_DIM_STEP = 32  # the widest instruction set takes two vectors of 16 channels at once


class _Block(ctypes.Structure):
    """`struct block` of block.h."""

    _fields_ = (
        ("attention_norm", POINTER),
        ("mlp_norm", POINTER),
        ("qkv", POINTER),
        ("output", POINTER),
        ("gate_up", POINTER),
        ("down", POINTER),
        ("n_heads", SIZE),
        ("n_kv_heads", SIZE),
        ("head_dim", SIZE),
        ("rounds", SIZE),
        ("eps", ctypes.c_double),
    )


class _Segment(ctypes.Structure):
    """`struct segment` of block.h."""

    _fields_ = (
        ("first_row", SIZE),
        ("length", SIZE),
        ("position", SIZE),
        ("capacity", SIZE),
        ("bits", SIZE),
        ("cache", POINTER),
    )


class FusedStep:
    """What all blocks of a stage share while one batch passes through them, in the kernels' form.

    `segments` are `(first_row, length, position, storage)`, storage a session's cache `[n_blocks, 2,
    n_kv_heads, capacity, head_dim]` in float32 or bfloat16; cosines and sines float32 `[n_positions,
    head_dim]`, of every position that the segments have.
    """

    def __init__(
        self, segments: Sequence[tuple[int, int, int, Tensor]], cos: Tensor, sin: Tensor, threads: int
    ) -> None:
        self._kept = [cos, sin, *(storage for *_, storage in segments)]  # alive as long as the addresses
        self.cos, self.sin, self.threads = cos.data_ptr(), sin.data_ptr(), threads
        self.segments = (_Segment * len(segments))(
            *(
                _Segment(
                    first,
                    length,
                    position,
                    storage.shape[3],
                    8 * storage.element_size(),
                    storage.data_ptr(),
                )
                for first, length, position, storage in segments
            )
        )


class FusedBlock:
    """The weights of one block, as addresses."""

    def __init__(
        self,
        norms: tuple[Tensor, Tensor],
        matrices: tuple[NativeMatrix, NativeMatrix, NativeMatrix, NativeMatrix],
        heads: tuple[int, int, int],
        rounds: bool,
        eps: float,
    ) -> None:
        """Float32 norms of attention and MLP; qkv, output, gate_up, down; `n_heads, n_kv_heads, head_dim`.

        `rounds`: what bfloat16 matrices are multiplied with may be rounded to bfloat16.
        """
        kernels = library()
        assert kernels is not None, "whoever made the matrices has asked whether the kernels are there"
        self._call = kernels.cake_block
        self._kept = (norms, matrices)
        qkv, output, gate_up, _ = matrices
        # What qkv or gate_up gives, what attention gives, and the activations that the next product reads.
        widest = max(qkv.rows, gate_up.rows) + output.columns + max(matrix.columns for matrix in matrices)
        self.scratch_bytes = 4 * widest  # for a token
        self.weight_bytes = sum(matrix.nbytes for matrix in matrices)
        pointers = [norm.data_ptr() for norm in norms] + [matrix.address for matrix in matrices]
        self._block = _Block(*pointers, *heads, rounds, eps)
        self._address = ctypes.addressof(self._block)

    def __call__(self, x: Tensor, index: int, step: FusedStep) -> None:
        """Pass contiguous float32 `[n_tokens, hidden_size]` through the block, in place."""
        segments = step.segments
        done = self._call(
            self._address,
            index,
            x.data_ptr(),
            x.shape[0],
            step.cos,
            step.sin,
            segments,
            len(segments),
            step.threads,
        )
        if not done:
            raise MemoryError("no memory for the activations of a batch")


def tokens_at_once(blocks: Sequence[FusedBlock]) -> int:
    """How many pass a stage of these blocks together: more is faster, but takes memory too."""
    budget = max(LEAST_SCRATCH, sum(block.weight_bytes for block in blocks) // SCRATCH_SHARE)
    most = budget // max(block.scratch_bytes for block in blocks)
    return max(16, min(MOST_TOKENS, most // 16 * 16))


def can_fuse(dtype: torch.dtype, head_dim: int, biased: bool) -> bool:
    """Whether the kernels can run a block of this kind, if they have its matrices."""
    return dtype in (torch.float32, torch.bfloat16) and head_dim % HEAD_DIM_STEP == 0 and not biased
