"""Bundles: each holds its node's weights and nothing else, complete or not at all."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file

from cake.errors import CakeError, CheckpointError, TopologyError
from cake.topology import load_topology
from cake.weights import split as split_module
from cake.weights.checkpoint import Checkpoint, block_of, open_checkpoint
from cake.weights.split import split

TOPOLOGY = """
pc:
  host: 10.0.0.1:10128
  description: gaming PC
  layers: [model.layers.0-1, model.layers.4]
phone:
  host: 10.0.0.2:10128
  layers: [model.layers.2]
"""
BLOCKS = {"pc": {0, 1, 4}, "phone": {2}, "master": {3, 5, None}}


@pytest.fixture
def topology(tmp_path: Path) -> Path:
    path = tmp_path / "topology.yml"
    path.write_text(TOPOLOGY)
    return path


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy with a tokenizer's file and one that no bundle needs."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "the-model"))
    (folder / "tokenizer.json").write_text('{"any": "thing"}')
    (folder / "notes.txt").write_text("not for bundles")
    return folder


def source_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(-1), b.view(-1))


@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bundles_hold_exactly_their_nodes_tensors(
    shard_size: str, dtype: torch.dtype, topology: Path, tmp_path: Path
) -> None:
    torch.set_default_dtype(dtype)
    try:
        source = make_tiny_llama(tmp_path / "source", shard_size=shard_size)
    finally:
        torch.set_default_dtype(torch.float32)
    split(str(source), topology, tmp_path / "out")
    expected = source_tensors(source)
    assert next(iter(expected.values())).dtype == dtype
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["master-node", "pc-node", "phone-node"]
    for name, blocks in BLOCKS.items():
        found = load_file(tmp_path / "out" / f"{name}-node" / "model" / "model.safetensors")
        assert found.keys() == {tensor for tensor in expected if block_of(tensor) in blocks}
        assert all(same_bytes(found[tensor], expected[tensor]) for tensor in found)


def test_master_without_blocks_keeps_embedding_norm_and_head(model: Path, tmp_path: Path) -> None:
    (tmp_path / "all.yml").write_text("one: {host: 'h:1', layers: [model.layers.0-5]}")
    split(str(model), tmp_path / "all.yml", tmp_path / "out")
    master = tmp_path / "out" / "master-node" / "model" / "model.safetensors"
    assert load_file(master).keys() == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_format_is_what_transformers_expects(model: Path, topology: Path, tmp_path: Path) -> None:
    split(str(model), topology, tmp_path / "out")
    path = tmp_path / "out" / "phone-node" / "model" / "model.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    header_length = int.from_bytes(path.read_bytes()[:8], "little")
    assert header_length % 8 == 0


def test_each_bundle_has_its_topology(model: Path, topology: Path, tmp_path: Path) -> None:
    split(str(model), topology, tmp_path / "out")
    whole = load_topology(topology)
    assert load_topology(tmp_path / "out" / "master-node" / "topology.yml") == whole
    for name in ("pc", "phone"):
        nodes = load_topology(tmp_path / "out" / f"{name}-node" / "topology.yml").nodes
        assert nodes == {name: whole.nodes[name]}


def test_small_files_are_copied_and_others_are_not(model: Path, topology: Path, tmp_path: Path) -> None:
    split(str(model), topology, tmp_path / "out")
    for name in BLOCKS:
        bundle = tmp_path / "out" / f"{name}-node"
        assert sorted(p.name for p in bundle.iterdir()) == ["model", "topology.yml"]
        assert sorted(p.name for p in (bundle / "model").iterdir()) == [
            "config.json",
            "fingerprints.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
        ]
        for file in ("config.json", "generation_config.json", "tokenizer.json"):
            assert (bundle / "model" / file).read_bytes() == (model / file).read_bytes()


@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
def test_every_bundle_knows_every_blocks_fingerprint(shard_size: str, topology: Path, tmp_path: Path) -> None:
    source = make_tiny_llama(tmp_path / "source", shard_size=shard_size)
    split(str(source), topology, tmp_path / "out")
    original = Checkpoint(source)
    for name in BLOCKS:
        bundle = open_checkpoint(str(tmp_path / "out" / f"{name}-node"), lambda _: True)
        for block in range(6):
            assert bundle.block_fingerprint(block) == original.block_fingerprint(block) is not None


def test_a_bundle_can_be_split_again(model: Path, tmp_path: Path) -> None:
    (tmp_path / "first.yml").write_text("one: {host: 'h:1', layers: [model.layers.5]}")
    (tmp_path / "then.yml").write_text("two: {host: 'h:1', layers: [model.layers.0]}")
    split(str(model), tmp_path / "first.yml", tmp_path / "out")
    split(str(tmp_path / "out" / "master-node"), tmp_path / "then.yml", tmp_path / "out2")
    marks = json.loads((tmp_path / "out2" / "two-node" / "model" / "fingerprints.json").read_text())
    assert marks["5"] == Checkpoint(model).block_fingerprint(5)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_splitting_again_replaces(model: Path, topology: Path, tmp_path: Path) -> None:
    split(str(model), topology, tmp_path / "out")
    first = everything(tmp_path / "out")
    (tmp_path / "out" / "pc-node" / "model" / "model.safetensors").write_bytes(b"old")
    (tmp_path / "out" / "pc-node" / "model" / "leftover").write_bytes(b"old")
    split(str(model), topology, tmp_path / "out")
    assert everything(tmp_path / "out") == first


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError])
@pytest.mark.parametrize("n_windows", [0, 4, 31])
def test_interrupted_split_leaves_whole_bundles_only(
    error: BaseException, n_windows: int, model: Path, topology: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    real, done = split_module._all_windows, 0

    def windows(found):  # type: ignore[no-untyped-def]
        nonlocal done
        for window in real(found):
            done += 1
            if done > n_windows:
                raise error
            yield window

    monkeypatch.setattr(split_module, "_all_windows", windows)
    raised = CheckpointError if isinstance(error, OSError) else error
    with pytest.raises(raised):  # type: ignore[call-overload]
        split(str(model), topology, tmp_path / "out")
    # The 27 tensors of pc's three blocks come first.
    left = ["pc-node"] if n_windows == 31 else []
    assert [p.name for p in (tmp_path / "out").iterdir()] == left
    for name in left:
        assert len(load_file(tmp_path / "out" / name / "model" / "model.safetensors")) == 27


def test_interrupted_split_keeps_the_older_bundle(
    model: Path, topology: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split(str(model), topology, tmp_path / "out")
    first = everything(tmp_path / "out")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(split_module, "write_safetensors", stop)
    with pytest.raises(KeyboardInterrupt):
        split(str(model), topology, tmp_path / "out")
    assert everything(tmp_path / "out") == first


def test_full_disk_is_said_in_one_line(
    model: Path, topology: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(split_module, "write_safetensors", full)
    with pytest.raises(
        CheckpointError, match=f"splitting into {re.escape(str(tmp_path / 'out'))} failed: .*No space left"
    ):
        split(str(model), topology, tmp_path / "out")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_foreign_folder_is_refused_and_kept(kind: str, model: Path, topology: Path, tmp_path: Path) -> None:
    place = tmp_path / "out" / "phone-node"
    place.parent.mkdir()
    if kind == "folder":
        place.mkdir()
        (place / "diary.txt").write_text("dear diary")
    else:
        place.write_text("dear diary")
    before = everything(tmp_path / "out")
    with pytest.raises(
        CheckpointError, match=f"{re.escape(str(place))} exists and is not a bundle; choose another"
    ):
        split(str(model), topology, tmp_path / "out")
    assert everything(tmp_path / "out") == before  # not even pc's bundle, which would come first


def test_output_that_is_a_file(model: Path, topology: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(CheckpointError, match=f"splitting into {re.escape(str(tmp_path / 'out'))} failed: "):
        split(str(model), topology, tmp_path / "out")


def test_topology_that_does_not_fit(model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.yml").write_text("a: {host: 'h:1', layers: [model.layers.4-6]}")
    with pytest.raises(TopologyError, match="'a' claims block 6, but the model's last block is 5"):
        split(str(model), tmp_path / "t.yml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_there(model: Path, tmp_path: Path) -> None:
    """The file of a model that promises more blocks than it holds."""
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 8}))
    (tmp_path / "t.yml").write_text("a: {host: 'h:1', layers: [model.layers.6]}")
    with pytest.raises(CheckpointError, match="holds no weights for node 'a'"):
        split(str(model), tmp_path / "t.yml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_shard_is_found_before_anything_is_written(topology: Path, tmp_path: Path) -> None:
    source = make_tiny_llama(tmp_path / "source", shard_size="100KB")
    last = sorted(source.glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(CheckpointError, match=f"{last.name} is missing; it should hold"):
        split(str(source), topology, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_node_name_that_would_leave_the_output_folder(model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.yml").write_text("../escaped: {host: 'h:1', layers: [model.layers.0]}")
    with pytest.raises(CakeError, match="escaped"):
        split(str(model), tmp_path / "t.yml", tmp_path / "out")
    assert not (tmp_path / "escaped-node").exists()
