"""llama.cpp beside Cake: which file of which weights it is given."""

from pathlib import Path

import pytest
from peer import CHOICES, TYPES, Peer, gguf_file, gguf_name, gguf_path
from peer_cluster import best

from cake.weights.checkpoint import Checkpoint


def test_a_file_is_named_after_its_weights(tiny_model: Path) -> None:
    checkpoint = Checkpoint(tiny_model)
    paths = [gguf_path(checkpoint, kind) for kind in CHOICES]
    assert len(set(paths)) == len(CHOICES) == 4
    for path, kind in zip(paths, CHOICES, strict=True):
        assert path.name.startswith(f"{checkpoint.name}-") and path.name.endswith(f"-{kind}.gguf")


def test_every_mode_has_a_counterpart() -> None:
    assert TYPES == {"none": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
    assert set(TYPES.values()) < set(CHOICES)


def test_a_file_that_exists_is_taken(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.cache_directory", lambda: tmp_path)
    checkpoint = Checkpoint(tiny_model)
    file = gguf_path(checkpoint, "Q4_1")
    file.parent.mkdir()
    file.touch()
    assert gguf_file("no-python", checkpoint, "Q4_1", 1) == file


def test_names_of_tensors() -> None:
    assert gguf_name("model.layers.3.mlp.up_proj.weight") == "blk.3.ffn_up.weight"
    assert gguf_name("model.norm.weight") == "output_norm.weight"


def test_the_best_of_several_ways_counts_for_each_figure() -> None:
    peers = [Peer(None, "1", "one"), Peer(None, "1", "other")]  # type: ignore[arg-type]
    for peer, runs in zip(peers, ([(9, 9), (5, 1)], [(9, 9), (3, 2)]), strict=True):
        peer._runs = list(runs)  # of which the first is not counted
    assert best(peers) == (5, 2)
