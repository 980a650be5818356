"""What a person can choose, as the command line hands it on. None means: as the model says."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cake.net.admission import Network


@dataclass(frozen=True)
class ComputeOptions:
    """Which model, and how this process computes it."""

    model: str | None
    dtype: str | None
    quantize: Literal["none", "int8", "int4"]
    device: str | None
    threads: int | None
    context: int | None
    cache_memory: int | None  # bytes


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose tokens."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    repeat_penalty: float | None
    repeat_last_n: int
    seed: int


@dataclass(frozen=True)
class MasterOptions:
    """A master's run."""

    compute: ComputeOptions
    sampling: SamplingOptions
    topology: Path | None
    prompt: str
    system_prompt: str
    raw: bool
    chat: bool
    max_tokens: int
    speculate: Literal["none", "ngram"]
    draft_model: str | None
    as_json: bool
    wire_dtype: str | None
    trace: Path | None
    dead_after: float  # seconds
    rejoin_timeout: float
    adopt: bool
    api: str | None  # host:port
    api_origins: frozenset[str]
    cluster_key: str | None = field(repr=False)
    api_key: str | None = field(repr=False)


@dataclass(frozen=True)
class WorkerOptions:
    """A worker's run."""

    compute: ComputeOptions
    topology: Path | None
    name: str | None
    address: str
    dead_after: float  # seconds
    drain: float
    allow: tuple[Network, ...]
    cluster_key: str | None = field(repr=False)
