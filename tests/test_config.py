"""`config.json` in its many forms becomes one `ModelConfig`, or is refused by name."""

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tiny_llama
from safetensors import safe_open

import cake
from cake.errors import CheckpointError
from cake.model.config import ModelConfig, RopeConfig, token_ids
from cake.weights.checkpoint import Checkpoint

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
RAW: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
}


def config(*without: str, **changes: Any) -> ModelConfig:
    """Llama 3 8B's config with changes."""
    raw = {name: value for name, value in {**RAW, **changes}.items() if name not in without}
    return ModelConfig.from_hf(raw, "here/config.json")


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_number_of_weights_is_that_of_the_tensors(biased: bool, tied: bool, tmp_path: Path) -> None:
    changes = {"attention_bias": biased, "mlp_bias": biased, "tie_word_embeddings": tied}
    folder = make_tiny_llama(tmp_path, **changes)
    with safe_open(folder / "model.safetensors", "np") as file:
        n = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert Checkpoint(folder).config.n_parameters == n
    assert config().n_parameters == 8_030_261_248, "as Llama 3 8B has"


def test_plain_form() -> None:
    assert config() == ModelConfig(
        n_blocks=32,
        hidden_size=4096,
        intermediate_size=14336,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        context=131072,
        norm_eps=1e-5,
        rope=RopeConfig(500000.0),
        attention_bias=False,
        mlp_bias=False,
        tied_head=False,
        dtype="float32",
        stop_ids=(),
    )


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({"rope_scaling": None}, RopeConfig(500000.0)),
        ({"rope_theta": None}, RopeConfig(10000.0)),
        ({"rope_scaling": {"rope_type": "default"}}, RopeConfig(500000.0)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, RopeConfig(500000.0, "linear", 4.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeConfig(500000.0, "linear", 2.0)),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192),
        ),
        (
            {"rope_theta": None, "rope_parameters": {"rope_type": "llama3", "rope_theta": 3e5, **LLAMA3}},
            RopeConfig(300000.0, "llama3", 8.0, 1.0, 4.0, 8192),
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, RopeConfig(1e6)),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": None}},
            RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 131072),
        ),
    ],
)
def test_every_form_of_rope(changes: dict[str, Any], rope: RopeConfig) -> None:
    assert config(**changes).rope == rope


def test_head_dim_given_or_derived() -> None:
    assert config(head_dim=64).head_dim == 64
    assert config(head_dim=None).head_dim == 128


def test_missing_kv_heads_are_as_many_as_heads() -> None:
    assert config("num_key_value_heads").n_kv_heads == 32
    assert config(num_key_value_heads=None).n_kv_heads == 32


@pytest.mark.parametrize(
    ("value", "ids"), [(2, (2,)), ([128001, 128009], (128001, 128009)), (None, ()), (0, (0,)), ([], ())]
)
def test_end_tokens(value: object, ids: tuple[int, ...]) -> None:
    assert token_ids(value) == ids
    assert config(eos_token_id=value).stop_ids == ids


def test_dtype_in_both_spellings() -> None:
    assert config(torch_dtype="bfloat16").dtype == "bfloat16"
    assert config(dtype="float16").dtype == "float16"
    assert config(dtype="float16", torch_dtype="bfloat16").dtype == "float16"


def test_switches() -> None:
    assert config(attention_bias=True).attention_bias
    assert config(mlp_bias=True).mlp_bias
    assert config(tie_word_embeddings=True).tied_head


YARN = {"rope_type": "yarn", "factor": 4.0}
REFUSED = {
    "other architecture": ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM is not supported"),
    "no architecture": ({"architectures": None}, "unnamed architecture is not supported"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "quantized with 'gptq'"),
    "quantized, unsaid how": ({"quantization_config": {"bits": 4}}, "quantized with 'unknown'"),
    "yarn": ({"rope_scaling": YARN}, "rope scaling 'yarn' is not supported"),
    "yarn, new form": ({"rope_parameters": {**YARN, "rope_theta": 1e4}}, "rope scaling 'yarn'"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
    "linear without factor": (
        {"rope_scaling": {"type": "linear"}},
        "rope_scaling: factor must be a positive number, not None",
    ),
    "linear with no factor": ({"rope_scaling": {"type": "linear", "factor": None}}, "factor"),
    "llama3 without bounds": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "rope_scaling: low_freq_factor must be a positive number, not None",
    ),
    "rope is no map": ({"rope_scaling": "linear"}, "rope_scaling"),
    "hidden size negative": ({"hidden_size": -1}, "hidden_size must be a positive whole number, not -1"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads must be a positive whole number, not 0"),
    "half a block": (
        {"num_hidden_layers": 1.5},
        "num_hidden_layers must be a positive whole number, not 1.5",
    ),
    "size as text": ({"vocab_size": "128256"}, "vocab_size must be a positive whole number"),
    "size as truth": ({"vocab_size": True}, "vocab_size must be a positive whole number"),
    "negative context": ({"max_position_embeddings": -5}, "max_position_embeddings must be"),
    "epsilon as text": ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    "equal bounds": (
        {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
        "low_freq_factor must be below high_freq_factor",
    ),
    "uneven groups": ({"num_key_value_heads": 5}, "32 attention heads cannot share 5 key/value heads"),
    "odd head_dim": ({"head_dim": 63}, "head_dim 63 is odd"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^here/config.json: .*{message}"):
        config(**changes)


@pytest.mark.parametrize(
    "name",
    ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"],
)
def test_missing_number(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name} must be a positive whole number, not None"):
        config(name)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 10000.0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rms_norm_eps": 1e-6},
        {"num_hidden_layers": 31},
        {"num_key_value_heads": 4},
        {"head_dim": 64},
        {"intermediate_size": 11008},
        {"attention_bias": True},
        {"mlp_bias": True},
    ],
)
def test_fingerprint_changes_with_what_blocks_compute(changes: dict[str, Any]) -> None:
    assert config(**changes).fingerprint != config().fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        {"eos_token_id": 5},
        {"max_position_embeddings": 8192},
        {"vocab_size": 128258},
        {"tie_word_embeddings": True},
        {"rope_scaling": {"rope_type": "default"}},
        {"head_dim": 128},
    ],
)
def test_fingerprint_stays_with_what_does_not(changes: dict[str, Any]) -> None:
    assert config(**changes).fingerprint == config().fingerprint


def test_fingerprint_is_16_hex_digits() -> None:
    assert len(bytes.fromhex(config().fingerprint)) == 8


def test_the_documentations_fingerprint() -> None:
    text = (Path(cake.__file__).parent / "protocol" / "PROTOCOL.md").read_text(encoding="utf-8")
    line = next(line.strip() for line in text.splitlines() if line.strip().startswith('{"attention_bias"'))
    llama3_8b = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
    }
    fingerprint = ModelConfig.from_hf(llama3_8b).fingerprint
    assert hashlib.blake2b(line.encode(), digest_size=8).hexdigest() == fingerprint
    assert fingerprint in text
