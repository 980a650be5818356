"""Rotary embedding, held against `transformers`."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from cake.model.config import ModelConfig, RopeConfig
from cake.model.rope import RopeTable, inverse_frequencies, rotate

LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 500000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    LLAMA31,
    {**LLAMA31, "factor": 32.0, "original_max_position_embeddings": 4096},
]


def reference(rope: dict[str, Any], head_dim: int) -> tuple[LlamaConfig, torch.Tensor]:
    """The config of `transformers`, and its inverse frequencies."""
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters=dict(rope),
    )
    if rope["rope_type"] == "default":  # has no entry of its own in the table
        return config, LlamaRotaryEmbedding.compute_default_rope_parameters(config)[0]
    return config, ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))[0]


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("rope", ROPES)
def test_inverse_frequencies(rope: dict[str, Any], head_dim: int) -> None:
    config, expected = reference(rope, head_dim)
    ours = ModelConfig.from_hf({**config.to_dict(), "architectures": ["LlamaForCausalLM"]})
    assert ours.rope.type == rope["rope_type"]
    assert expected.shape == (head_dim // 2,)
    torch.testing.assert_close(inverse_frequencies(ours.rope, head_dim), expected, rtol=1e-6, atol=0)


def test_llama3_keeps_high_divides_low_and_blends_between() -> None:
    rope = RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    ratio = inverse_frequencies(RopeConfig(500000.0), 128) / inverse_frequencies(rope, 128)
    assert ratio[0] == 1
    assert ratio[-1] == 8
    assert ((ratio > 1.001) & (ratio < 7.999)).any()


def test_rotation_is_that_of_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 2, 16, generator=generator)
    table = RopeTable(RopeConfig(10000.0), 16, torch.device("cpu"), torch.float32)
    positions = torch.tensor([0, 7, 99])
    cos, sin = table.at(positions)
    assert cos.shape == sin.shape == (3, 1, 16)
    ours = rotate(q, cos, sin)
    config, _ = reference(ROPES[0], 16)
    theirs_cos, theirs_sin = LlamaRotaryEmbedding(config)(q, positions[None])
    theirs, _ = apply_rotary_pos_emb(q[None], q[None], theirs_cos, theirs_sin, unsqueeze_dim=2)
    torch.testing.assert_close(ours, theirs[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(ours[0], q[0])
    assert not torch.allclose(ours[1], q[1], atol=0.1)


def test_a_table_that_grew_holds_what_a_long_one_does() -> None:
    rope, device = RopeConfig(10000.0), torch.device("cpu")
    grown, long = (RopeTable(rope, 16, device, torch.float32) for _ in range(2))
    long.at(torch.tensor([5000]))
    for last in (3, 300, 301, 5000):
        positions = torch.arange(last + 1)
        for part, expected in zip(grown.at(positions), long.at(positions), strict=True):
            assert torch.equal(part, expected)
