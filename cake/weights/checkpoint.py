"""A checkpoint: a model's config, its tensors by name, its tokenizer's files. Read on demand.

`open_checkpoint` takes what a person types after `--model`. Knows nothing of stages or nodes: who
wants which tensors comes in as a predicate over names.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cake.errors import CheckpointError
from cake.model.config import ModelConfig, token_ids
from cake.weights.demo_model import demo_model_folder
from cake.weights.hub import INDEX, SINGLE, fetch_model, is_hub_id
from cake.weights.safetensors_files import DTYPES, SafetensorsFile, TensorEntry

FINGERPRINTS = "fingerprints.json"
TOPOLOGY_FILE = "topology.yml"
SAMPLE_BYTES, SAMPLES = 4096, 16

Wanted = Callable[[str], bool]


def block_of(name: str) -> int | None:
    """The number of the block that a tensor belongs to; none for embedding, norm and head."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None


class Checkpoint:
    """A folder with `config.json` and safetensors; single file, or index and shards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, SafetensorsFile] = {}
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file; name the folder with config.json and safetensors")
        if not folder.is_dir():
            hint = "; a hub id has the form organisation/name" if len(folder.parts) == 1 else ""
            raise CheckpointError(f"no model folder at {folder}{hint}")
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} has no config.json; is it a Hugging Face model folder?")
        raw = _read_json(folder / "config.json")
        self.config = ModelConfig.from_hf(raw, str(folder / "config.json"))

    @property
    def name(self) -> str:
        """The model's name, as far as its folder tells it."""
        parts = self.folder.resolve().parts
        if parts[-1] == "model":  # a bundle
            return parts[-2]
        snapshot = re.fullmatch(r"models--.+--(.+)", parts[-3]) if len(parts) > 3 else None
        return snapshot[1] if snapshot else parts[-1]

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """What `generation_config.json` says; empty when there is none."""
        path = self.folder / "generation_config.json"
        return _read_json(path) if path.is_file() else {}

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer, from both config files."""
        more = token_ids(self.generation_config.get("eos_token_id"))
        return frozenset((*self.config.stop_ids, *more))

    @cached_property
    def _file_of(self) -> dict[str, str]:
        """Name of every tensor -> name of the file that holds it."""
        if (self.folder / INDEX).is_file():
            weight_map = _read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
                raise CheckpointError(f"{self.folder / INDEX}: weight_map must name files beside it")
            return weight_map
        if (self.folder / SINGLE).is_file():
            return dict.fromkeys(self._open(SINGLE).entries, SINGLE)
        raise CheckpointError(
            f"{self.folder} has no weights: neither {SINGLE} nor {INDEX}"
            + (" (its .bin files are pickles, which Cake never loads)" if self._has_bin() else "")
        )

    def _has_bin(self) -> bool:
        return any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pth"))

    def names(self) -> Iterable[str]:
        """The names of all tensors."""
        return self._file_of.keys()

    def find(self, name: str) -> tuple[SafetensorsFile, TensorEntry]:
        """The file and the entry of a tensor."""
        if name not in self._file_of:
            bundle = (self.folder / FINGERPRINTS).is_file()
            hint = "; it is the bundle of another node or role" if bundle else ""
            raise CheckpointError(f"{self.folder} has no tensor {name}{hint}")
        file_name = self._file_of[name]
        if not (self.folder / file_name).is_file():
            raise CheckpointError(f"{self.folder / file_name} is missing; it should hold {name}")
        file = self._open(file_name)
        if name not in file.entries:
            raise CheckpointError(f"{file.path} does not hold {name}, which {INDEX} promises")
        return file, file.entries[name]

    def read_into(self, name: str, destination: Tensor) -> None:
        """Fill `destination` with a tensor, converted to its dtype and device.

        Raises `CheckpointError` when the tensor is missing or not of that shape.
        """
        self._checked(name, *destination.shape).read_into(name, destination)

    def windows(self, name: str, rows: int, columns: int) -> Iterator[Tensor]:
        """The matrix `name` as stored, some rows at a time; a piece's memory is soon used again.

        Raises `CheckpointError` as `read_into` does.
        """
        return self._checked(name, rows, columns).rows(name)

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is stored. Raises `CheckpointError` when Cake cannot read it."""
        file, entry = self.find(name)
        if entry.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise CheckpointError(f"{file.path}: {name} is {entry.dtype}; Cake reads {known}")
        return DTYPES[entry.dtype]

    def _checked(self, name: str, *shape: int) -> SafetensorsFile:
        """The file of a tensor, if it can be read and has that shape."""
        self.dtype_of(name)
        file, entry = self.find(name)
        if entry.shape != shape:
            raise CheckpointError(
                f"{file.path}: {name} has shape {list(entry.shape)}, but config.json asks for {list(shape)}"
            )
        return file

    def bytes_of(self, block: int | None) -> int:
        """Stored bytes of a block's tensors, or of those that belong to no block."""
        entries = [self.find(name)[1] for name in self.names() if block_of(name) == block]
        return sum(entry.end - entry.start for entry in entries)

    def span_fingerprint(self, span: range) -> str | None:
        """16 hex digits for the weights of a span; none if some of its blocks are not known here."""
        marks = [self.block_fingerprint(block) for block in span]
        known = [mark for mark in marks if mark is not None]
        if len(known) < len(marks):
            return None
        return hashlib.blake2b("".join(known).encode(), digest_size=8).hexdigest()

    def block_fingerprint(self, block: int) -> str | None:
        """16 hex digits that tell this block's weights from any other's; none if they are not here.

        Covers names, dtypes, shapes, and `SAMPLES` samples of each tensor: reading every byte would
        take the master minutes for weights that it never loads. A bundle, which holds only some
        blocks, has the others' fingerprints in a file.
        """
        names = sorted(name for name in self.names() if block_of(name) == block)
        if not names or not all((self.folder / self._file_of[n]).is_file() for n in names):
            return self._recorded_fingerprints.get(str(block))
        digest = hashlib.blake2b(digest_size=8)
        for name in names:
            file, entry = self.find(name)
            digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
            for start in _sample_starts(entry.end - entry.start):
                digest.update(file.bytes_at(entry, start, SAMPLE_BYTES))
        return digest.hexdigest()

    @cached_property
    def _recorded_fingerprints(self) -> dict[str, Any]:
        path = self.folder / FINGERPRINTS
        return _read_json(path) if path.is_file() else {}

    def _open(self, file_name: str) -> SafetensorsFile:
        if file_name not in self._files:
            self._files[file_name] = SafetensorsFile(self.folder / file_name)
        return self._files[file_name]


def _sample_starts(n_bytes: int) -> Iterator[int]:
    """Offsets of the samples, evenly spread from the first bytes to the last."""
    last = max(0, n_bytes - SAMPLE_BYTES)
    return (last * i // (SAMPLES - 1) for i in range(SAMPLES))


def _is_bundle(folder: Path) -> bool:
    return (folder / TOPOLOGY_FILE).is_file() and (folder / "model" / "config.json").is_file()


def bundled_topology(model: str | None) -> Path | None:
    """The topology file in the bundle that `--model` names, if it names one."""
    folder = Path(model).expanduser() if model else None
    if folder is None or not _is_bundle(folder):
        return None
    return folder / TOPOLOGY_FILE


def open_checkpoint(model: str | None, wanted: Wanted) -> Checkpoint:
    """Open what `--model` names: a folder, a bundle, or a hub id; the demo model when none.

    From the hub, only the files are downloaded that hold a tensor whose name is `wanted`.
    """
    if model is None:
        return Checkpoint(demo_model_folder(wanted))
    folder = Path(model).expanduser()
    if _is_bundle(folder):
        return Checkpoint(folder / "model")
    if is_hub_id(model) and not folder.exists():
        return Checkpoint(fetch_model(model, wanted))
    return Checkpoint(folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON map")
    return content


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value == Path(value).name and bool(value)
