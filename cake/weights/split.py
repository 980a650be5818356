"""`cake-split-model`: cut a checkpoint into bundles, one for each node and one for the master.

Bytes are copied as they are, a window at a time, so that any model is split in little memory. A
bundle is written beside its final place and moved there when it is complete.
"""

import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from cake.errors import CheckpointError
from cake.topology import MASTER, Topology, dump_topology, load_topology
from cake.weights.checkpoint import (
    FINGERPRINTS,
    TOPOLOGY_FILE,
    Checkpoint,
    block_of,
    open_checkpoint,
)
from cake.weights.hub import SINGLE, SMALL_FILES
from cake.weights.safetensors_files import SafetensorsFile, TensorEntry


@dataclass(frozen=True)
class Bundle:
    """What a bundle holds: the text of its topology and the names of its tensors."""

    name: str
    topology: str
    tensors: tuple[str, ...]


def split(model: str, topology_file: Path, output: Path) -> None:
    """Write `<output>/<node>-node/` for every node and for the master."""
    topology = load_topology(topology_file)
    checkpoint = open_checkpoint(model, lambda _: True)
    bundles = plan(checkpoint, topology)
    marks = {str(b): checkpoint.block_fingerprint(b) for b in range(checkpoint.config.n_blocks)}
    try:
        output.mkdir(parents=True, exist_ok=True)
        for bundle in bundles:
            _refuse_foreign(output / f"{bundle.name}-node")
        total = sum(_n_bytes(checkpoint, name) for bundle in bundles for name in bundle.tensors)
        with tqdm(total=total, desc="splitting", unit="B", unit_scale=True, delay=2) as bar:
            for bundle in bundles:
                bar.set_postfix_str(bundle.name, refresh=False)
                _write(checkpoint, bundle, json.dumps(marks, indent=2), output, bar)
        for bundle in bundles:
            print(output / f"{bundle.name}-node")
    except OSError as error:
        raise CheckpointError(f"splitting into {output} failed: {error.strerror or error}") from error


def plan(checkpoint: Checkpoint, topology: Topology) -> list[Bundle]:
    """The bundles, nodes first. Raises when topology and checkpoint do not fit."""
    topology.layout(checkpoint.config.n_blocks)  # or say what does not fit
    own = {block for span in topology.own_spans(checkpoint.config.n_blocks) for block in span}
    blocks = {node.name: {b for span in node.spans for b in span} for node in topology.nodes.values()}
    blocks[MASTER] = own
    tensors: dict[str, list[str]] = {name: [] for name in blocks}
    for name in checkpoint.names():
        block = block_of(name)
        for node, served in blocks.items():
            if block in served or (block is None and node == MASTER):
                tensors[node].append(name)
    texts = {name: dump_topology(Topology({name: node})) for name, node in topology.nodes.items()}
    texts[MASTER] = dump_topology(topology)
    for name, names in tensors.items():
        for tensor in names:
            checkpoint.find(tensor)  # a missing shard is found out before anything is written
        if not names:
            raise CheckpointError(f"{checkpoint.folder} holds no weights for node {name!r}")
    return [Bundle(name, texts[name], tuple(tensors[name])) for name in tensors]


def _n_bytes(checkpoint: Checkpoint, name: str) -> int:
    _, entry = checkpoint.find(name)
    return entry.end - entry.start


def _refuse_foreign(place: Path) -> None:
    """An older bundle may be replaced; anything else of that name is not ours to delete."""
    if place.exists() and not (place / TOPOLOGY_FILE).is_file():
        raise CheckpointError(f"{place} exists and is not a bundle; choose another --output")


def _write(checkpoint: Checkpoint, bundle: Bundle, fingerprints: str, output: Path, bar: "tqdm[Any]") -> None:
    place = output / f"{bundle.name}-node"
    scratch = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=output))
    try:
        model = scratch / "model"
        model.mkdir()
        (scratch / TOPOLOGY_FILE).write_text(bundle.topology, encoding="utf-8")
        (model / FINGERPRINTS).write_text(fingerprints + "\n")
        for name in SMALL_FILES:
            if (checkpoint.folder / name).is_file():
                shutil.copyfile(checkpoint.folder / name, model / name)
        found = {name: checkpoint.find(name) for name in bundle.tensors}
        with (model / SINGLE).open("wb") as file:
            write_safetensors(file, found, bar)
        scratch.chmod(0o755)  # mkdtemp makes folders that only their owner may enter
        if place.exists():  # moved aside first, so that one of the two is always whole
            place.rename(scratch.with_name(scratch.name + "-old"))
        scratch.rename(place)
        shutil.rmtree(scratch.with_name(scratch.name + "-old"), ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_safetensors(
    file: BinaryIO, found: dict[str, tuple[SafetensorsFile, TensorEntry]], bar: "tqdm[Any]"
) -> None:
    """A safetensors file with the given tensors, their bytes copied from where they lie."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (_, entry) in found.items():
        end = position + entry.end - entry.start
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8 bytes
    file.write(struct.pack("<Q", len(text)) + text)
    for window in _all_windows(found):
        file.write(window)
        bar.update(len(window))


def _all_windows(
    found: dict[str, tuple[SafetensorsFile, TensorEntry]],
) -> Iterator[memoryview]:
    for source, entry in found.values():
        yield from source.windows(entry)
