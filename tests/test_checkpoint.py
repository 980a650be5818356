"""A checkpoint on disk: what it holds, what it lacks, and how two copies are told apart."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_llama
from safetensors.torch import load_file, save_file

from cake.errors import CheckpointError
from cake.weights.checkpoint import Checkpoint, block_of, open_checkpoint

INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.2.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def sharded_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("sharded"), shard_size="100KB")


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model-copy"))


@pytest.fixture
def shards(sharded_model: Path, tmp_path: Path) -> Path:
    """A copy, in shards, that the test may damage."""
    return Path(shutil.copytree(sharded_model, tmp_path / "shards-copy"))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard_of(folder: Path, name: str) -> str:
    return str(json.loads((folder / INDEX).read_text())["weight_map"][name])


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.0.mlp.up_proj.weight", 0),
        ("model.layers.31.input_layernorm.weight", 31),
        ("model.embed_tokens.weight", None),
        ("model.norm.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_block_of(name: str, block: int | None) -> None:
    assert block_of(name) == block


@pytest.mark.parametrize("form", ["tiny_model", "sharded_model"])
def test_every_tensor_is_read_as_it_is(form: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(form)
    expected = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    checkpoint = Checkpoint(folder)
    assert set(checkpoint.names()) == expected.keys()
    assert len(expected) == 6 * 9 + 3
    for name, tensor in expected.items():
        destination = torch.full_like(tensor, float("nan"))
        checkpoint.read_into(name, destination)
        assert torch.equal(destination, tensor)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no model folder at {re.escape(str(tmp_path / 'none'))}"):
        Checkpoint(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file is a file; name the folder"):
        Checkpoint(tmp_path / "file")


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{re.escape(str(tmp_path))} has no config.json"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"config\.json cannot be read as JSON"),
        (b"", r"config\.json cannot be read as JSON"),
        (b"\xff\xfe", r"config\.json cannot be read as JSON"),
        (b"[]", r"config\.json must hold a JSON map"),
        (b"{}", r"config\.json: an unnamed architecture is not supported"),
    ],
)
def test_broken_config(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as raised:
        Checkpoint(tmp_path)
    assert str(raised.value).startswith(str(tmp_path))


def test_no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights: neither") as raised:
        Checkpoint(model).names()
    assert ".bin" not in str(raised.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_only_pickles(name: str, model: Path) -> None:
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(CheckpointError, match=r"has no weights: .*pickles, which Cake never loads"):
        Checkpoint(model).names()


def test_missing_shard(shards: Path) -> None:
    missing = shard_of(shards, Q_PROJ)
    (shards / missing).unlink()
    with pytest.raises(
        CheckpointError, match=f"{re.escape(str(missing))} is missing; it should hold {Q_PROJ}"
    ):
        Checkpoint(shards).read_into(Q_PROJ, torch.empty(64, 64))


def test_shards_that_are_not_asked_for_may_be_missing(shards: Path) -> None:
    wanted = shard_of(shards, Q_PROJ)
    for path in shards.glob("*.safetensors"):
        if path.name != wanted:
            path.unlink()
    destination = torch.zeros(64, 64)
    Checkpoint(shards).read_into(Q_PROJ, destination)
    assert torch.equal(destination, load_file(shards / wanted)[Q_PROJ])


def test_missing_tensor(model: Path) -> None:
    change_tensors(model, lambda tensors: tensors.pop(Q_PROJ))
    with pytest.raises(CheckpointError, match=f"{re.escape(str(model))} has no tensor {Q_PROJ}"):
        Checkpoint(model).read_into(Q_PROJ, torch.empty(64, 64))


def test_shard_without_what_the_index_promises(shards: Path) -> None:
    name = shard_of(shards, Q_PROJ)
    tensors = load_file(shards / name)
    del tensors[Q_PROJ]
    save_file(tensors, shards / name)
    with pytest.raises(CheckpointError, match=rf"{name} does not hold {Q_PROJ}, which {INDEX} promises"):
        Checkpoint(shards).read_into(Q_PROJ, torch.empty(64, 64))


def test_wrong_shape(model: Path) -> None:
    message = rf"{Q_PROJ} has shape \[64, 64\], but config\.json asks for \[128, 32\]"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(model).read_into(Q_PROJ, torch.empty(128, 32))


def test_unsupported_dtype(model: Path) -> None:
    change_tensors(model, lambda tensors: tensors.update({Q_PROJ: torch.zeros(64, 64, dtype=torch.int8)}))
    message = f"{Q_PROJ} is I8; Cake reads F64, F32, F16, BF16"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(model).read_into(Q_PROJ, torch.empty(64, 64))


@pytest.mark.parametrize(
    "weight_map",
    [
        {Q_PROJ: "../elsewhere.safetensors"},
        {Q_PROJ: "/etc/passwd"},
        {Q_PROJ: "sub/model.safetensors"},
        {Q_PROJ: ""},
        {Q_PROJ: 5},
        {Q_PROJ: None},
        [],
        None,
    ],
)
def test_index_that_names_no_files_beside_it(weight_map: object, shards: Path) -> None:
    change_json(shards / INDEX, weight_map=weight_map)
    with pytest.raises(CheckpointError, match=f"{INDEX}: weight_map must name files beside it"):
        Checkpoint(shards).names()


def test_stop_ids_of_both_files(model: Path) -> None:
    change_json(model / "config.json", eos_token_id=128009)
    (model / "generation_config.json").write_text('{"eos_token_id": [128001, 128008, 128009]}')
    assert Checkpoint(model).stop_ids == {128001, 128008, 128009}
    (model / "generation_config.json").write_text('{"temperature": 0.6}')
    assert Checkpoint(model).stop_ids == {128009}
    (model / "generation_config.json").unlink()
    assert Checkpoint(model).stop_ids == {128009}
    assert Checkpoint(model).generation_config == {}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("models/SmolLM2", "SmolLM2"),
        ("Llama-3/macbook-node/model", "macbook-node"),
        ("hub/models--org--Tiny-Llama/snapshots/0a1b2c", "Tiny-Llama"),
    ],
)
def test_name(path: str, name: str, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / path)
    assert Checkpoint(tmp_path / path).name == name


def test_fingerprints_of_a_copy_are_the_same(tiny_model: Path, model: Path, sharded_model: Path) -> None:
    original, copy, shards = Checkpoint(tiny_model), Checkpoint(model), Checkpoint(sharded_model)
    marks = [original.block_fingerprint(block) for block in range(6)]
    assert len(set(marks)) == 6
    assert None not in marks
    assert [copy.block_fingerprint(block) for block in range(6)] == marks
    assert [shards.block_fingerprint(block) for block in range(6)] == marks
    assert original.span_fingerprint(range(1, 4)) == copy.span_fingerprint(range(1, 4))
    assert original.span_fingerprint(range(1, 4)) != original.span_fingerprint(range(1, 5))


@pytest.mark.parametrize("place", [0, 2048, -1])
def test_one_changed_weight_changes_its_block_alone(place: int, tiny_model: Path, model: Path) -> None:
    change_tensors(model, lambda tensors: tensors[Q_PROJ].view(-1)[place].add_(0.001))
    original, changed = Checkpoint(tiny_model), Checkpoint(model)
    different = [b for b in range(6) if original.block_fingerprint(b) != changed.block_fingerprint(b)]
    assert different == [2]
    assert original.span_fingerprint(range(3)) != changed.span_fingerprint(range(3))
    assert original.span_fingerprint(range(3, 6)) == changed.span_fingerprint(range(3, 6))


def test_other_dtype_has_another_fingerprint(tiny_model: Path, model: Path) -> None:
    name = "model.layers.2.input_layernorm.weight"
    change_tensors(model, lambda tensors: tensors.update({name: tensors[name].to(torch.bfloat16)}))
    assert Checkpoint(tiny_model).block_fingerprint(2) != Checkpoint(model).block_fingerprint(2)


def test_no_fingerprint_without_the_shard(shards: Path, sharded_model: Path) -> None:
    (shards / shard_of(shards, Q_PROJ)).unlink()
    checkpoint = Checkpoint(shards)
    assert checkpoint.block_fingerprint(2) is None
    assert checkpoint.span_fingerprint(range(6)) is None
    assert checkpoint.block_fingerprint(5) == Checkpoint(sharded_model).block_fingerprint(5)
    assert checkpoint.block_fingerprint(6) is None  # there is none such


def test_recorded_fingerprints_stand_for_absent_blocks_only(shards: Path, sharded_model: Path) -> None:
    (shards / shard_of(shards, Q_PROJ)).unlink()
    (shards / "fingerprints.json").write_text('{"2": "aaaaaaaaaaaaaaaa", "5": "bbbbbbbbbbbbbbbb"}')
    checkpoint, original = Checkpoint(shards), Checkpoint(sharded_model)
    assert checkpoint.block_fingerprint(2) == "aaaaaaaaaaaaaaaa"
    assert checkpoint.block_fingerprint(5) == original.block_fingerprint(5)


def test_open_checkpoint_takes_folders_and_bundles(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "node" / "model")
    (tmp_path / "node" / "topology.yml").write_text("")
    assert open_checkpoint(str(tiny_model), lambda _: True).folder == tiny_model
    assert open_checkpoint(str(tmp_path / "node"), lambda _: True).folder == tmp_path / "node" / "model"


def test_open_checkpoint_prefers_a_folder_to_a_hub_id(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cake.weights.checkpoint.fetch_model", lambda name, _: tiny_model)
    assert open_checkpoint("org/name", lambda _: True).folder == tiny_model
    shutil.copytree(tiny_model, tmp_path / "org" / "name")
    assert open_checkpoint("org/name", lambda _: True).folder == Path("org/name")


def test_open_checkpoint_without_a_name_is_the_demo_model(demo_model: Path) -> None:
    assert open_checkpoint(None, lambda _: True).folder == demo_model
