"""Blocks fused by Cake's own CPU kernels against the same blocks in torch, and quantized ones in both."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_llama
from safetensors.torch import load_file, save_file
from torch import Tensor

from cake import kernels
from cake.device import DeviceThread
from cake.kernels.block import tokens_at_once
from cake.model import linear
from cake.model.batch import Batch, Segment
from cake.model.linear import Placement, Quantization
from cake.stage import LocalStage
from cake.weights.checkpoint import Checkpoint

pytestmark = pytest.mark.skipif(not kernels.instruction_sets(), reason="no compiled kernels here")

# A prompt, a token, its continuation beside two others, three tokens of three sessions, a rewind.
BATCHES: list[tuple[tuple[int, int, int], ...]] = [
    ((1, 0, 70),),
    ((1, 70, 1),),
    ((1, 71, 30), (2, 0, 10), (3, 0, 5)),
    ((1, 101, 1), (2, 10, 1), (3, 5, 1)),
    ((1, 60, 3), (2, 11, 2)),
]


WIDE = {
    "head_dim": 32,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_size": 96,
    "initializer_range": 0.08,  # small, so that rounding does not grow from block to block
}


def stored_in_bfloat16(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: x.bfloat16() for name, x in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With heads wide enough for the fused block, and three queries to a key."""
    return stored_in_bfloat16(make_tiny_llama(tmp_path_factory.mktemp("wide"), **WIDE))


@pytest.fixture(params=kernels.instruction_sets())
def computing_with(request: pytest.FixtureRequest) -> Iterator[None]:
    library = kernels.library()
    assert library is not None
    assert library.cake_use(request.param.encode())
    yield
    assert library.cake_use(kernels.instruction_sets()[0].encode())


async def stage_of(
    model: Path, quantize: Quantization, threads: int = 1, dtype: torch.dtype = torch.float32
) -> LocalStage:
    thread = DeviceThread(Placement(torch.device("cpu"), dtype, quantize), threads)
    checkpoint = Checkpoint(model)
    stage = LocalStage("here", range(checkpoint.config.n_blocks), checkpoint.config, 512, thread)
    await thread.run(stage.load, checkpoint)
    return stage


def in_torch(stage: LocalStage) -> LocalStage:
    for block in stage._layers:
        block.fused = None
    return stage


def states(n_tokens: int) -> Tensor:
    return torch.randn(n_tokens, 96, generator=torch.Generator().manual_seed(n_tokens))


async def run(stage: LocalStage, batches: Sequence[Sequence[tuple[int, int, int]]]) -> list[Tensor]:
    results = []
    for segments in batches:
        hidden = states(sum(length for _, _, length in segments))
        batch = Batch(hidden, tuple(Segment(*segment) for segment in segments))
        results.append((await stage.forward(batch)).hidden)
    return results


@pytest.mark.parametrize("threads", [1, 2])
async def test_a_fused_block_computes_what_torch_does(model: Path, threads: int) -> None:
    fused = await stage_of(model, "none", threads)
    assert all(block.fused for block in fused._layers)
    plain = in_torch(await stage_of(model, "none"))
    for found, expected in zip(await run(fused, BATCHES), await run(plain, BATCHES), strict=True):
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


async def test_bfloat16_is_near_float64(model: Path) -> None:
    exact = await run(await stage_of(model, "none", dtype=torch.float64), BATCHES)
    stage = await stage_of(model, "none", dtype=torch.bfloat16)
    assert all(block.fused for block in stage._layers)
    for found, expected in zip(await run(stage, BATCHES), exact, strict=True):
        distance = (found - expected).norm() / expected.norm()
        assert distance <= 0.004
    assert {cache.storage.dtype for cache in stage._caches.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("quantize", "dtype"),
    [("none", torch.float32), ("none", torch.bfloat16), ("int8", torch.bfloat16), ("int4", torch.float32)],
)
async def test_it_does_not_matter_what_tokens_come_together(
    model: Path, quantize: Quantization, dtype: torch.dtype, computing_with: None
) -> None:
    """A prompt at once, in pieces beside others, token by token: bit for bit the same."""
    stage, hidden = await stage_of(model, quantize, 2, dtype), states(70)

    async def forward(*parts: tuple[int, int, int]) -> dict[int, Tensor]:
        segments = tuple(Segment(*part) for part in parts)
        rows = torch.cat([hidden[at : at + length] for _, at, length in parts])
        result = (await stage.forward(Batch(rows, segments))).hidden
        return dict(zip((number for number, *_ in parts), result.split([n for *_, n in parts]), strict=True))

    whole = (await forward((1, 0, 70)))[1]
    await forward((2, 0, 50), (3, 0, 9))
    assert torch.equal((await forward((2, 50, 17), (3, 9, 20)))[2], whole[50:67])
    assert torch.equal((await forward((3, 29, 1), (2, 67, 3)))[2], whole[67:])
    for at in range(70):
        assert torch.equal((await forward((4, at, 1)))[4], whole[at : at + 1])


async def test_the_kernels_round_to_bfloat16_as_torch_does(
    model: Path, request: pytest.FixtureRequest
) -> None:
    """One batch in float32 and in bfloat16: the first block's keys and values are the same, but rounded.

    With instructions that multiply bfloat16 the activations would differ too.
    """
    library = kernels.library()
    assert library is not None
    library.cake_use(kernels.instruction_sets()[-1].encode())
    request.addfinalizer(lambda: library.cake_use(kernels.instruction_sets()[0].encode()))
    caches = []
    for dtype in (torch.float32, torch.bfloat16):
        stage = await stage_of(model, "none", dtype=dtype)
        await run(stage, [((1, 0, 70),)])
        caches.append(stage._caches[1].storage[0, :, :, :70])
    assert torch.equal(caches[0].bfloat16(), caches[1])


async def test_float32_weights_are_rounded_for_bfloat16(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wider"
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: x.float() for name, x in tensors.items()}, folder / "model.safetensors")
    stages = [await stage_of(path, "none", dtype=torch.bfloat16) for path in (model, folder)]
    assert stages[1].weights == "bfloat16"
    expected, found = [await run(stage, BATCHES) for stage in stages]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("quantize", ["int8", "int4"])
async def test_quantized_results_do_not_depend_on_the_batch(model: Path, quantize: Quantization) -> None:
    """However a prompt is cut and whoever travels along, to the last bit: the text stays the same."""
    stage, hidden = await stage_of(model, quantize), states(70)
    whole = (await stage.forward(Batch(hidden, (Segment(1, 0, 70),)))).hidden
    position = 0
    for length in (1, 2, 3, 4, 7, 13, 40):
        company = states(length)
        segments = (Segment(3, 0, length), Segment(2, position, length))
        rows = slice(position, position + length)
        both = (await stage.forward(Batch(torch.cat((company, hidden[rows])), segments))).hidden
        assert torch.equal(both[length:], whole[rows])
        position += length


async def test_parts_of_a_batch_give_what_the_whole_gives(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = await run(await stage_of(model, "int8"), BATCHES)
    monkeypatch.setattr("cake.kernels.block.MOST_TOKENS", 16)
    parts = await stage_of(model, "int8")
    assert tokens_at_once([block.fused for block in parts._layers if block.fused]) == 16
    assert all(map(torch.equal, await run(parts, BATCHES), whole))


@pytest.mark.parametrize(("quantize", "most"), [("int8", 0.02), ("int4", 0.25)])
@pytest.mark.parametrize("where", ["fused", "native", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_a_quantized_stage_is_near_the_full_one(
    model: Path,
    quantize: Quantization,
    most: float,
    where: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = await run(await stage_of(model, "none"), BATCHES)
    if where == "portable":
        monkeypatch.setattr(linear.kernels, "library", lambda: None)
    stage = await stage_of(model, quantize, dtype=dtype)
    assert stage.weights == quantize
    if where != "fused":
        in_torch(stage)
    for found, full in zip(await run(stage, BATCHES), expected, strict=True):
        assert (found - full).norm() <= most * full.norm()


async def test_biases_and_narrow_heads_are_left_to_torch(tiny_model: Path, tmp_path: Path) -> None:
    biased = make_tiny_llama(tmp_path, attention_bias=True, head_dim=32)
    for folder in (tiny_model, biased):
        stage = await stage_of(folder, "int8")
        assert not any(block.fused for block in stage._layers)


async def test_float32_beside_bfloat16_is_not_rounded(model: Path, tmp_path: Path) -> None:
    """k in float32 between q and v in bfloat16: the merged matrix must keep all of k."""
    folder = tmp_path / "mixed"
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name].float() * 1.001  # no longer a bfloat16
    save_file(tensors, folder / "model.safetensors")
    merged = (await stage_of(folder, "none"))._layers[0]._attention._qkv.matrix
    assert merged.look_up is not None
    q_rows, k_rows = 6 * 32, 2 * 32
    assert torch.equal(merged.look_up(torch.arange(q_rows, q_rows + k_rows)).float(), tensors[name])
