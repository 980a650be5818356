"""Llama, top-down: block, attention, MLP, norm; then the embedding and the head around them.

Every function takes a flat batch `[n_tokens, ...]`, in which segments say whose tokens they are
(`cake.model.batch`). Linear layers see the whole batch at once; attention goes segment by segment.
The names of the tensors are those of Hugging Face's `LlamaForCausalLM`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cake.kernels.block import FusedBlock, can_fuse
from cake.model.batch import Step, StepSegment
from cake.model.config import ModelConfig
from cake.model.linear import Linear, Placement, TensorSource
from cake.model.rope import rotate


class Block:
    """One transformer layer, `model.layers.N`."""

    def __init__(self, source: TensorSource, config: ModelConfig, number: int, placement: Placement) -> None:
        prefix = f"model.layers.{number}"
        hidden = config.hidden_size
        norm = f"{prefix}.input_layernorm.weight"
        self._attention_norm = RMSNorm(placement.read(source, norm, hidden), config.norm_eps)
        self._attention = Attention(source, config, f"{prefix}.self_attn", placement)
        norm = f"{prefix}.post_attention_layernorm.weight"
        self._mlp_norm = RMSNorm(placement.read(source, norm, hidden), config.norm_eps)
        self._mlp = MLP(source, config, f"{prefix}.mlp", placement)
        self.fused = self._fuse(config, placement)

    def _fuse(self, config: ModelConfig, placement: Placement) -> FusedBlock | None:
        """The same block for Cake's own CPU kernels, if they can run it."""
        biased = config.attention_bias or config.mlp_bias
        if not can_fuse(placement.dtype, config.head_dim, biased):
            return None
        qkv, output = self._attention.matrices
        gate_up, down = self._mlp.matrices
        if qkv is None or output is None or gate_up is None or down is None:
            return None
        norms = (self._attention_norm.weight.float(), self._mlp_norm.weight.float())
        heads = (config.n_heads, config.n_kv_heads, config.head_dim)
        rounds = placement.dtype == torch.bfloat16
        return FusedBlock(norms, (qkv, output, gate_up, down), heads, rounds, config.norm_eps)

    @property
    def weights(self) -> str:
        """How the matrices are kept: a dtype's name, `int8` or `int4`."""
        return self._mlp.weights

    @property
    def nbytes(self) -> int:
        """Bytes that its matrices occupy."""
        return self._attention.nbytes + self._mlp.nbytes

    def __call__(self, x: Tensor, index: int, step: Step) -> Tensor:
        """`x` `[n_tokens, hidden_size]`; `index` is the block's place in its stage's caches."""
        x = x + self._attention(self._attention_norm(x), index, step)
        return x + self._mlp(self._mlp_norm(x))


class Attention:
    """Grouped-query attention: `n_heads` queries share `n_kv_heads` keys and values."""

    def __init__(self, source: TensorSource, config: ModelConfig, prefix: str, placement: Placement) -> None:
        self._head_dim = config.head_dim
        self._n_heads, self._n_kv_heads = config.n_heads, config.n_kv_heads
        queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        projections = [
            (f"{prefix}.q_proj", queries),
            (f"{prefix}.k_proj", keys),
            (f"{prefix}.v_proj", keys),
        ]
        bias = config.attention_bias
        self._qkv = Linear.load(source, projections, config.hidden_size, placement, bias)
        output = [(f"{prefix}.o_proj", config.hidden_size)]
        self._output = Linear.load(source, output, queries, placement, bias)
        self.matrices = (self._qkv.matrix.native, self._output.matrix.native)
        self.nbytes = self._qkv.nbytes + self._output.nbytes

    def __call__(self, x: Tensor, index: int, step: Step) -> Tensor:
        n_tokens, n_rotated = x.shape[0], self._n_heads + self._n_kv_heads
        # [n_tokens, n_heads + 2 * n_kv_heads, head_dim]
        qkv = self._qkv(x).view(n_tokens, n_rotated + self._n_kv_heads, self._head_dim)
        rotated = rotate(qkv[:, :n_rotated], step.cos, step.sin)
        q, k, v = rotated[:, : self._n_heads], rotated[:, self._n_heads :], qkv[:, n_rotated:]
        parts = []
        for segment in step.segments:
            rows = segment.rows
            keys, values = segment.cache.write(index, segment.position, k[rows], v[rows])
            parts.append(_attend(q[rows], keys, values, segment))
        return self._output(parts[0] if len(parts) == 1 else torch.cat(parts))


def _attend(q: Tensor, keys: Tensor, values: Tensor, segment: StepSegment) -> Tensor:
    """Queries `[n, n_heads, head_dim]` over keys and values `[n_kv_heads, length, head_dim]`.

    The heads that share a key are folded into rows, `[n_kv_heads, group * n, head_dim]`, so that no
    key is ever copied per head. Returns `[n, n_heads * head_dim]`.
    """
    n, n_heads, head_dim = q.shape
    n_kv_heads = keys.shape[0]
    group = n_heads // n_kv_heads
    rows = q.view(n, n_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    rows = rows.reshape(1, n_kv_heads, group * n, head_dim)
    out = F.scaled_dot_product_attention(rows, keys[None], values[None], attn_mask=segment.mask)
    out = out.view(n_kv_heads, group, n, head_dim).permute(2, 0, 1, 3)
    return out.reshape(n, n_heads * head_dim)


class MLP:
    """The gated feed-forward layer: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, source: TensorSource, config: ModelConfig, prefix: str, placement: Placement) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        gate_up = [(f"{prefix}.gate_proj", inner), (f"{prefix}.up_proj", inner)]
        self._gate_up = Linear.load(source, gate_up, hidden, placement, bias)
        down = [(f"{prefix}.down_proj", hidden)]
        self._down = Linear.load(source, down, inner, placement, bias)
        self.weights = self._down.matrix.numbers
        self.matrices = (self._gate_up.matrix.native, self._down.matrix.native)
        self.nbytes = self._gate_up.nbytes + self._down.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return self._down(F.silu(gate) * up)


class RMSNorm:
    """Root mean square norm (Zhang and Sennrich, arXiv:1910.07467)."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self._eps = weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self._eps)


class Embedding:
    """Token ids to hidden states."""

    def __init__(self, look_up: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        self._look_up, self._dtype = look_up, dtype

    def __call__(self, ids: Tensor) -> Tensor:
        """From `[n_tokens]` to `[n_tokens, hidden_size]`."""
        return self._look_up(ids).to(self._dtype)


class Head:
    """The final norm and the projection to logits."""

    def __init__(self, norm: RMSNorm, output: Linear) -> None:
        self._norm, self._output = norm, output

    def __call__(self, x: Tensor) -> Tensor:
        """From `[n_tokens, hidden_size]` to logits `[n_tokens, vocab_size]`, float32."""
        return self._output(self._norm(x)).float()


def load_ends(source: TensorSource, config: ModelConfig, placement: Placement) -> tuple[Embedding, Head]:
    """What stands before the first block and after the last; one matrix for both where they are tied.

    A quantized head shares nothing: the embedding, of which only rows are looked up, stays as stored.
    """
    if placement.quantize == "int4":
        # Four bits cost more quality here than in all blocks together (scripts/bench.py --quality).
        placement = replace(placement, quantize="int8")
    norm = RMSNorm(placement.read(source, "model.norm.weight", config.hidden_size), config.norm_eps)
    name = "model.embed_tokens" if config.tied_head else "lm_head"
    output = Linear.load(source, [(name, config.vocab_size)], config.hidden_size, placement)
    look_up = output.matrix.look_up if config.tied_head else None
    if look_up is None:
        name = "model.embed_tokens.weight"
        stored = replace(placement, dtype=source.dtype_of(name))
        weight = stored.read(source, name, config.vocab_size, config.hidden_size)
        look_up = partial(F.embedding, weight=weight)
    return Embedding(look_up, placement.dtype), Head(norm, output)
