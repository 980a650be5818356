"""llama.cpp as a yardstick: the same model, threads and numbers of tokens, run by run beside Cake.

`bench.py --llama-cpp` calls this. llama.cpp runs in a process of its own (`peer_process.py`), under a
Python that may be another: two OpenMP runtimes in one process would fight for the cores. It is given a
random token for each step and chooses none, which Cake does; and it keeps to its own defaults: its KV
cache is float16, and its 4-bit files hold the head in 6 or 8 bits.

The GGUF files are kept in the cache directory. They are for speed only: they have no vocabulary, and
what does not change the speed (the order of the rows of q and k, rope scaling) is left as it is.
"""

import contextlib
import json
import math
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from cake.model.linear import Quantization
from cake.weights.checkpoint import Checkpoint
from cake.weights.demo_model import BLOCK_TENSOR_NAMES, TENSOR_NAMES, cache_directory

TYPES: dict[Quantization, str] = {"none": "BF16", "int8": "Q8_0", "int4": "Q4_0"}  # llama.cpp's counterparts
CHOICES = (*TYPES.values(), "Q4_1")
GGUF_NAMES = {theirs: ours for ours, theirs in (TENSOR_NAMES | BLOCK_TENSOR_NAMES).items()}


class Peer:
    """A llama.cpp that waits for its turn."""

    def __init__(self, process: "subprocess.Popen[str]", version: str, kind: str) -> None:
        self.name = f"llama.cpp {kind} (llama-cpp-python {version})"
        self._process = process
        self._runs: list[tuple[float, float]] = []

    def run(self) -> None:
        """One run of prompt and generation."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which the answer shows
            self._process.stdin.write("run\n")
            self._process.stdin.flush()
        self._runs.append(read_line(self._process))

    def medians(self) -> tuple[float, float]:
        """Tokens per second of the prompt and of the generation; the first run is not counted."""
        prompts, generations = zip(*self._runs[1:], strict=True)
        return statistics.median(prompts), statistics.median(generations)


@contextlib.contextmanager
def running_llama_cpp(
    python: str, checkpoint: Checkpoint, kind: str, threads: int, prompt: int, generate: int
) -> Iterator[Peer]:
    """llama.cpp with the checkpoint's weights as one of `CHOICES`, loaded and waiting."""
    file = gguf_file(python, checkpoint, kind, threads)
    with started(python, "measure", file, threads, prompt, generate) as (process, version):
        yield Peer(process, version, kind)


@contextlib.contextmanager
def started(python: str, *job: object) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A process that does a job, and the version of its llama-cpp-python."""
    command = [python, str(Path(__file__).with_name("peer_process.py")), *map(str, job)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        hello = read_line(process)
        if "error" in hello:
            raise click.ClickException(
                f"{python} cannot import llama_cpp ({hello['error']}): pip install llama-cpp-python, or name "
                "a Python that has it with --llama-python"
            )
        yield process, hello["version"]
    finally:
        process.kill()
        process.communicate()


def read_line(process: "subprocess.Popen[str]") -> Any:
    """What the process says next."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise click.ClickException(f"llama.cpp's process ended with code {process.wait()}")
    return json.loads(line)


def check_python(python: str) -> None:
    """Raise `ClickException` unless that Python has llama-cpp-python."""
    with started(python, "check"):
        pass


# The files.


def gguf_file(python: str, checkpoint: Checkpoint, kind: str, threads: int) -> Path:
    """The checkpoint as a GGUF file of one of `CHOICES`; made where it is not there yet."""
    path = gguf_path(checkpoint, kind)
    if path.is_file():
        return path
    if kind == "BF16":
        return made(path, lambda scratch: convert(checkpoint, scratch))
    source = gguf_file(python, checkpoint, "BF16", threads)

    def quantize(scratch: Path) -> None:
        with started(python, "quantize", source, scratch, kind, threads) as (process, _):
            if process.wait():
                raise click.ClickException(f"llama.cpp could not make {kind} of {source}")

    return made(path, quantize)


def gguf_path(checkpoint: Checkpoint, kind: str) -> Path:
    """Where that file is kept: models of one name are told apart by their size."""
    n_bytes = sum(entry.end - entry.start for _, entry in map(checkpoint.find, tensor_names(checkpoint)))
    return cache_directory() / "gguf" / f"{checkpoint.name}-{n_bytes}-{kind}.gguf"


def made(path: Path, make: Callable[[Path], None]) -> Path:
    """Have a file made beside its final place and moved there when complete."""
    click.echo(f"making {path}, which is kept", err=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    try:
        make(scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def tensor_names(checkpoint: Checkpoint) -> list[str]:
    """The tensors that llama.cpp takes: no head of its own where the embedding serves as one."""
    tied = checkpoint.config.tied_head
    known = [name for name in checkpoint.names() if name.split(".")[-1] in ("weight", "bias")]
    return sorted(name for name in known if not (tied and name.startswith("lm_head.")))


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight` there."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{GGUF_NAMES[stem]}.{kind}"
    _, _, number, part = stem.split(".", 3)
    return f"blk.{number}.{GGUF_NAMES[part]}.{kind}"


def convert(checkpoint: Checkpoint, path: Path) -> None:
    """Write the checkpoint's matrices in bfloat16, its vectors in float32, one tensor in memory at a time."""
    try:
        import gguf
        import numpy as np
    except ModuleNotFoundError as error:
        raise click.ClickException("--llama-cpp writes a GGUF file: pip install gguf") from error
    writer = gguf.GGUFWriter(path, "llama")
    add_sizes(writer, checkpoint)
    names = tensor_names(checkpoint)
    for name in names:
        _, entry = checkpoint.find(name)
        kind, size = ("BF16", 2) if len(entry.shape) > 1 else ("F32", 4)
        n_bytes = size * math.prod(entry.shape)
        raw = gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(gguf_name(name), entry.shape, np.dtype(np.void), n_bytes, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in tqdm(names, desc="converting to GGUF", unit="tensor", delay=2, leave=False):
        _, entry = checkpoint.find(name)
        tensor = torch.empty(entry.shape, dtype=torch.bfloat16 if len(entry.shape) > 1 else torch.float32)
        checkpoint.read_into(name, tensor)
        writer.write_tensor_data(tensor.view(torch.uint8).numpy())
    writer.close()


def add_sizes(writer: Any, checkpoint: Checkpoint) -> None:
    """The model's config, as far as the speed depends on it."""
    config = checkpoint.config
    writer.add_block_count(config.n_blocks)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
