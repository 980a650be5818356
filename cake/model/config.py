"""The shape of a model, read through one door from the many forms of `config.json`.

Knows nothing of weights: a `ModelConfig` says what the tensors must look like, not where they are.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cake.errors import CheckpointError

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM",)
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3")

RopeType = Literal["default", "linear", "llama3"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base frequency and how it is stretched for long contexts."""

    theta: float
    type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_context: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """What the mathematics needs to know. Sizes are counts of elements."""

    n_blocks: int
    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    context: int
    norm_eps: float
    rope: RopeConfig
    attention_bias: bool = False
    mlp_bias: bool = False
    tied_head: bool = False
    dtype: str = "float32"
    stop_ids: tuple[int, ...] = ()

    @property
    def fingerprint(self) -> str:
        """16 hex digits over everything that changes the result of a block's computation."""
        fields = asdict(self)
        for name in ("dtype", "stop_ids", "context", "tied_head", "vocab_size"):
            del fields[name]
        text = json.dumps(fields, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def n_parameters(self) -> int:
        """Weights of the whole model."""
        wide, inner, hidden = self.n_heads * self.head_dim, self.intermediate_size, self.hidden_size
        kv = self.n_kv_heads * self.head_dim
        block = 2 * hidden * (wide + kv) + 3 * hidden * inner + 2 * hidden
        block += self.attention_bias * (wide + 2 * kv + hidden) + self.mlp_bias * (2 * inner + hidden)
        ends = (1 if self.tied_head else 2) * self.vocab_size * hidden + hidden
        return self.n_blocks * block + ends

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str = "config.json") -> "ModelConfig":
        """Read the contents of a Hugging Face `config.json`.

        Raises `CheckpointError`, which names `where`, for an architecture or a variant that Cake
        does not compute, and for a value that is missing or makes no sense.
        """
        _refuse_unsupported(raw, where)
        number = _Reader(raw, where)
        hidden_size, n_heads = number.whole("hidden_size"), number.whole("num_attention_heads")
        config = cls(
            n_blocks=number.whole("num_hidden_layers"),
            hidden_size=hidden_size,
            intermediate_size=number.whole("intermediate_size"),
            n_heads=n_heads,
            n_kv_heads=number.whole("num_key_value_heads", n_heads),
            head_dim=number.whole("head_dim", hidden_size // n_heads),
            vocab_size=number.whole("vocab_size"),
            context=number.whole("max_position_embeddings", 2048),
            norm_eps=number.real("rms_norm_eps", 1e-6),
            rope=_rope(raw, where),
            attention_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            tied_head=bool(raw.get("tie_word_embeddings", False)),
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
            stop_ids=token_ids(raw.get("eos_token_id")),
        )
        if config.n_heads % config.n_kv_heads:
            raise CheckpointError(
                f"{where}: {n_heads} attention heads cannot share {config.n_kv_heads} key/value heads"
            )
        if config.head_dim % 2:
            raise CheckpointError(f"{where}: head_dim {config.head_dim} is odd; rope needs pairs")
        return config


def token_ids(value: object) -> tuple[int, ...]:
    """The forms of `eos_token_id`, none, a number or a list, as a tuple."""
    if isinstance(value, int):
        return (value,)
    return tuple(i for i in value if isinstance(i, int)) if isinstance(value, list) else ()


class _Reader:
    """Reads positive numbers and names the one that is none; null counts as absent."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self._raw, self._where = raw, where

    def whole(self, name: str, default: int | None = None) -> int:
        value = self._value(name, default)
        if type(value) is not int or value <= 0:
            raise CheckpointError(f"{self._where}: {name} must be a positive whole number, not {value!r}")
        return value

    def real(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise CheckpointError(f"{self._where}: {name} must be a positive number, not {value!r}")
        return float(value)

    def _value(self, name: str, default: float | None) -> Any:
        value = self._raw.get(name)
        return default if value is None else value


def _refuse_unsupported(raw: Mapping[str, Any], where: str) -> None:
    supported = ", ".join(SUPPORTED_ARCHITECTURES)
    names = raw.get("architectures") or ["an unnamed architecture"]
    for name in names if isinstance(names, list) else [names]:
        if name not in SUPPORTED_ARCHITECTURES:
            raise CheckpointError(f"{where}: {name} is not supported; Cake runs {supported}")
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(
            f"{where}: hidden_act {raw['hidden_act']!r} is not supported; Llama uses 'silu'"
        )
    if raw.get("quantization_config"):
        given = raw["quantization_config"]
        method = given.get("quant_method", "unknown") if isinstance(given, Mapping) else given
        raise CheckpointError(
            f"{where}: weights quantized with {method!r} are not supported; "
            "take the model's float16 or bfloat16 version"
        )


def _rope(raw: Mapping[str, Any], where: str) -> RopeConfig:
    """Both generations of the field: `rope_theta` + `rope_scaling`, and `rope_parameters`."""
    field = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    scaling = raw.get(field) or {}
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"{where}: {field} must be a map, not {scaling!r}")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in SUPPORTED_ROPE_TYPES:
        supported = ", ".join(SUPPORTED_ROPE_TYPES)
        raise CheckpointError(f"{where}: rope scaling {kind!r} is not supported; Cake computes {supported}")
    inner, outer = _Reader(scaling, f"{where}: {field}"), _Reader(raw, where)
    theta = inner.real("rope_theta", outer.real("rope_theta", 10000.0))
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", inner.real("factor"))
    low, high = inner.real("low_freq_factor"), inner.real("high_freq_factor")
    if low >= high:
        raise CheckpointError(f"{where}: {field}: low_freq_factor must be below high_freq_factor")
    original = inner.whole("original_max_position_embeddings", outer.whole("max_position_embeddings"))
    return RopeConfig(theta, "llama3", inner.real("factor"), low, high, original)
