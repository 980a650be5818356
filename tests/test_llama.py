"""The blocks compute what `transformers` computes, for every variant of Llama and any cut of a batch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, loaded_stage, make_tiny_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from cake.device import DeviceThread
from cake.model.batch import Batch, Segment, causal_mask
from cake.model.llama import Embedding, Head, load_ends
from cake.stage import LocalStage
from cake.weights.checkpoint import Checkpoint

PROMPT = [3, 141, 59, 26, 53, 58, 97, 93, 238, 46, 26, 43, 38, 32, 79, 50, 28, 84, 197, 169]
OTHER = [9, 9, 200, 7, 1, 0, 255]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "GQA 4/2": {},
    "MQA 4/1": {"num_key_value_heads": 1},
    "MHA 4/4": {"num_key_value_heads": 4},
    "head_dim given": {"head_dim": 24},
    "llama3 rope": {"rope_scaling": LLAMA3, "rope_theta": 5000.0},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "large epsilon": {"rms_norm_eps": 0.1},
}


class Model:
    """A whole model of this process: embedding, all blocks, head."""

    def __init__(self, embedding: Embedding, head: Head, stage: LocalStage) -> None:
        self._embedding, self._head, self._stage = embedding, head, stage

    @classmethod
    async def load(cls, folder: Path, thread: DeviceThread) -> "Model":
        checkpoint = Checkpoint(folder)
        config = checkpoint.config
        embedding, head = await thread.run(load_ends, checkpoint, config, thread.placement)
        return cls(embedding, head, await loaded_stage(checkpoint, range(config.n_blocks), thread))

    async def logits(self, ids: Sequence[int], *segments: Segment) -> Tensor:
        hidden = self._embedding(torch.tensor(ids))
        return self._head((await self._stage.forward(Batch(hidden, segments))).hidden)


def reference(folder: Path, ids: Sequence[int]) -> Tensor:
    """Logits `[n_tokens, vocab_size]` of `transformers` in float32."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([list(ids)])).logits[0]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
async def test_logits_are_those_of_transformers(
    changes: dict[str, Any], tmp_path: Path, thread: DeviceThread
) -> None:
    folder = make_tiny_llama(tmp_path, **{"num_hidden_layers": 3, **changes})
    expected = reference(folder, PROMPT)
    assert expected[-1].std() > 0.5  # else anything would be close
    model = await Model.load(folder, thread)
    for chunk in (len(PROMPT), 1, 7):
        for start in range(0, len(PROMPT), chunk):
            ids = PROMPT[start : start + chunk]
            logits = await model.logits(ids, Segment(chunk, start, len(ids)))
            torch.testing.assert_close(logits, expected[start : start + len(ids)], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "GQA 4/2"])
def test_variants_differ_from_the_plain_model(name: str, tmp_path: Path) -> None:
    """A variant that changed nothing would prove nothing."""
    plain = reference(make_tiny_llama(tmp_path / "plain", num_hidden_layers=3), PROMPT)
    changes = {"num_hidden_layers": 3, **VARIANTS[name]}
    varied = reference(make_tiny_llama(tmp_path / "varied", **changes), PROMPT)
    assert (plain - varied).abs().max() > 0.01


async def test_shards(tmp_path: Path, thread: DeviceThread) -> None:
    folder = make_tiny_llama(tmp_path, shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    model = await Model.load(folder, thread)
    logits = await model.logits(PROMPT, Segment(0, 0, len(PROMPT)))
    torch.testing.assert_close(logits, reference(folder, PROMPT), rtol=0, atol=1e-4)


async def test_old_form_of_rope_scaling_in_the_file(tmp_path: Path, thread: DeviceThread) -> None:
    """transformers 5 writes `rope_parameters`; the models of Llama 3.1 say `rope_scaling`."""
    folder = make_tiny_llama(tmp_path, num_hidden_layers=2, rope_scaling=LLAMA3, rope_theta=5000.0)
    expected = reference(folder, PROMPT)
    raw = json.loads((folder / "config.json").read_text())
    parameters = raw.pop("rope_parameters")
    raw["rope_theta"] = parameters.pop("rope_theta")
    raw["rope_scaling"] = parameters
    (folder / "config.json").write_text(json.dumps(raw))
    model = await Model.load(folder, thread)
    logits = await model.logits(PROMPT, Segment(0, 0, len(PROMPT)))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


async def test_two_sessions_in_one_flat_batch(tiny_model: Path, thread: DeviceThread) -> None:
    model = await Model.load(tiny_model, thread)
    alone = [
        await model.logits(ids, Segment(name, 0, len(ids))) for name, ids in (("a", PROMPT), ("b", OTHER))
    ]
    # Both prompts but for the last two tokens, then a token of each, then the other way round.
    a, b = len(PROMPT) - 2, len(OTHER) - 2
    await model.logits([*PROMPT[:a], *OTHER[:b]], Segment("A", 0, a), Segment("B", 0, b))
    third = await model.logits([PROMPT[a], OTHER[b]], Segment("A", a, 1), Segment("B", b, 1))
    last = await model.logits([OTHER[-1], PROMPT[-1]], Segment("B", b + 1, 1), Segment("A", a + 1, 1))
    torch.testing.assert_close(third, torch.stack((alone[0][-2], alone[1][-2])), rtol=0, atol=1e-4)
    torch.testing.assert_close(last, torch.stack((alone[1][-1], alone[0][-1])), rtol=0, atol=1e-4)


async def test_writing_at_an_earlier_position_forgets(tiny_model: Path, thread: DeviceThread) -> None:
    model = await Model.load(tiny_model, thread)
    await model.logits(PROMPT, Segment("s", 0, len(PROMPT)))
    again = await model.logits(OTHER, Segment("s", 5, len(OTHER)))
    fresh = await model.logits([*PROMPT[:5], *OTHER], Segment("t", 0, 5 + len(OTHER)))
    torch.testing.assert_close(again, fresh[5:], rtol=0, atol=1e-4)


async def test_a_session_longer_than_the_first_capacity(tiny_model: Path, thread: DeviceThread) -> None:
    ids = [(7 * i * i + 3) % TINY["vocab_size"] for i in range(300)]  # type: ignore[operator]
    model = await Model.load(tiny_model, thread)
    await model.logits(ids[:250], Segment("s", 0, 250))
    logits = await model.logits(ids[250:], Segment("s", 250, 50))
    torch.testing.assert_close(logits, reference(tiny_model, ids)[250:], rtol=0, atol=1e-4)


def test_causal_mask() -> None:
    no = float("-inf")
    like = torch.empty(0)
    assert causal_mask(1, 5, 2, like) is None
    assert torch.equal(
        causal_mask(2, 1, 2, like),
        torch.tensor([[0, 0, no], [0, 0, 0], [0, 0, no], [0, 0, 0]]),
    )
