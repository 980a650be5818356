"""The one model that is served, as Ollama's clients look at models."""

import hashlib
from datetime import datetime, timezone

from cake.api.ollama.answers import AvailableModels, ModelDescribed, ModelDetails, ModelEntry, RunningModels
from cake.api.service import Service

# Clients decide by it what a server can do: it is the version whose API this is.
VERSION = "0.12.6"
LATEST = ":latest"
NEVER = "9999-12-31T23:59:59Z"
# What a checkpoint's dtype is called, and how many bytes a weight of it has.
DTYPES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}


class Listed:
    """A service's model, told."""

    def __init__(self, service: Service) -> None:
        self._service, self._config = service, service.config
        self._level, n_bytes = DTYPES.get(self._config.dtype, (self._config.dtype, 2))
        self._size = n_bytes * self._config.n_parameters
        began = datetime.fromtimestamp(service.started, timezone.utc)
        self._began = began.isoformat().replace("+00:00", "Z")

    @property
    def available(self) -> AvailableModels:
        """`GET /api/tags`."""
        return {"models": [{**self._entry, "modified_at": self._began}]}

    @property
    def running(self) -> RunningModels:
        """`GET /api/ps`."""
        entry, context = self._entry, self._service.context
        return {"models": [{**entry, "expires_at": NEVER, "context_length": context}]}

    @property
    def described(self) -> ModelDescribed:
        """`POST /api/show`."""
        config = self._config
        return {
            "details": self._details,
            "modified_at": self._began,
            "capabilities": ["completion", "tools"] if self._service.knows_tools else ["completion"],
            "model_info": {
                "general.architecture": "llama",
                "general.basename": self._service.model,
                "general.parameter_count": config.n_parameters,
                "llama.attention.head_count": config.n_heads,
                "llama.attention.head_count_kv": config.n_kv_heads,
                "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
                "llama.block_count": config.n_blocks,
                "llama.context_length": self._service.context,
                "llama.embedding_length": config.hidden_size,
                "llama.feed_forward_length": config.intermediate_size,
                "llama.rope.dimension_count": config.head_dim,
                "llama.rope.freq_base": config.rope.theta,
                "llama.vocab_size": config.vocab_size,
            },
        }

    @property
    def _entry(self) -> ModelEntry:
        name = self._service.model + LATEST
        digest = hashlib.sha256(f"{self._service.model} {self._config.fingerprint}".encode()).hexdigest()
        return {"name": name, "model": name, "size": self._size, "digest": digest, "details": self._details}

    @property
    def _details(self) -> ModelDetails:
        return {
            "parent_model": "",
            "format": "safetensors",
            "family": "llama",
            "families": ["llama"],
            "parameter_size": _rounded(self._config.n_parameters),
            "quantization_level": self._level,
        }


def _rounded(n: int) -> str:
    return f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.1f}M"
