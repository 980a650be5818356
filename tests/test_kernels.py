"""Cake's own CPU kernels against the same products in float64, for every instruction set of this CPU."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cake import kernels
from cake.kernels.matrix import NativeMatrix

pytestmark = pytest.mark.skipif(not kernels.instruction_sets(), reason="no compiled kernels here")

SIZES = [(16, 32), (64, 576), (33, 80), (1, 31), (250, 1000)]
TOKENS = [1, 2, 3, 4, 7, 33, 150]


@pytest.fixture(params=kernels.instruction_sets() or ["none"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    library = kernels.library()
    assert library is not None
    assert library.cake_use(request.param.encode())
    yield request.param
    assert library.cake_use(kernels.instruction_sets()[0].encode())


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers with outliers, some rows and groups far smaller than others, and a row of zeros."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=random)
    values *= torch.rand((shape[0], 1), generator=random) * 3
    values[:, ::29] *= 20
    values[-1] *= 0 if shape[0] > 1 else 1
    return values


def quantized(weight: Tensor, bits: int) -> NativeMatrix:
    matrix = NativeMatrix(*weight.shape, bits)
    split = weight.shape[0] // 2  # as two windows of one tensor
    matrix.fill(0, weight[:split])
    matrix.fill(split, weight[split:])
    return matrix


def kept_values(weight: Tensor, bits: int) -> Tensor:
    """What the documented format keeps of a weight, in float64, found without the kernel."""
    weight = weight.float()
    if bits == 16:
        return weight.bfloat16().double()
    rows, columns = weight.shape
    groups = torch.nn.functional.pad(weight, (0, -columns % 32)).view(rows, -1, 32)
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    steps = (high - low) / 15 if bits == 4 else groups.abs().amax(2) / 127
    row_scales = steps.amax(1, keepdim=True) / 255
    unit = torch.where(row_scales > 0, row_scales, 1)
    scales = ((steps / unit + 0.999).floor().clamp(0, 255) * row_scales)[..., None]
    safe = torch.where(scales > 0, scales, 1)
    if bits == 8:
        kept = (groups / safe).round().clamp(-127, 127) * scales
    else:
        zeros = (-16 * low[..., None] / safe).round() / 16
        kept = ((groups / safe + zeros).round().clamp(0, 15) - zeros) * scales
    return kept.double().view(rows, -1)[:, :columns]


def rounded(x: Tensor) -> Tensor:
    """Activations as int8 in groups of 32, in float64."""
    n, columns = x.shape
    groups = torch.nn.functional.pad(x, (0, -columns % 32)).view(n, -1, 32)
    scales = groups.abs().amax(2, keepdim=True) / 127
    safe = torch.where(scales > 0, scales, 1)
    return ((groups / safe).round() * scales).double().view(n, -1)[:, :columns]


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_are_those_of_float64(instruction_set: str, size: tuple[int, int], bits: int) -> None:
    weight = numbers(*size)
    matrix = quantized(weight, bits)
    for n_tokens in TOKENS:
        x = numbers(n_tokens, size[1], seed=n_tokens)
        expected = (x.double() if bits == 16 else rounded(x)) @ kept_values(weight, bits).t()
        found = matrix.multiply(x)
        assert found.shape == (n_tokens, size[0])
        # A value that lies on the edge between two steps may fall to either side; nothing else differs.
        assert distance(found, expected) < (1e-6 if bits == 16 else 2e-3)


def test_what_may_be_rounded_is_or_is_not(instruction_set: str) -> None:
    """Activations in bfloat16 where there are instructions for it, else as they are."""
    weight = numbers(64, 576)
    matrix = quantized(weight, 16)
    for n_tokens in (1, 4, 16, 17, 33, 63, 64, 65, 150):
        x = numbers(n_tokens, 576, seed=n_tokens)
        taken = x.bfloat16() if instruction_set == "avx512bf16" else x
        found = matrix.multiply(x, rounds=True)
        assert distance(found, taken.double() @ kept_values(weight, 16).t()) < 1e-6
        assert distance(matrix.multiply(x), x.double() @ kept_values(weight, 16).t()) < 1e-6


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_token_does_not_depend_on_those_beside_it(instruction_set: str, bits: int, rounds: bool) -> None:
    matrix, x = quantized(numbers(80, 330), bits), numbers(150, 330, seed=1)
    whole = matrix.multiply(x, rounds)
    for first, n_tokens in ((0, 1), (5, 2), (1, 7), (3, 18), (20, 47), (70, 80)):
        part = matrix.multiply(x[first : first + n_tokens].contiguous(), rounds)
        assert torch.equal(part, whole[first : first + n_tokens])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_of_bfloat16_can_be_looked_up(instruction_set: str, size: tuple[int, int]) -> None:
    weight = numbers(*size)
    rows = torch.randint(size[0], (7,))
    assert torch.equal(quantized(weight, 16).look_up(rows), weight.bfloat16()[rows])


@pytest.mark.parametrize(("bits", "most"), [(4, 0.1), (8, 0.01), (16, 0.003)])
def test_products_are_near_those_of_the_weights(instruction_set: str, bits: int, most: float) -> None:
    weight, x = torch.randn(300, 512), torch.randn(5, 512)
    assert distance(quantized(weight, bits).multiply(x), x.double() @ weight.t().double()) < most


@pytest.mark.parametrize("bits", [4, 8])
def test_the_worst_case_overflows_nowhere(instruction_set: str, bits: int) -> None:
    weight = torch.ones(32, 64)
    weight[16:] = -1
    for sign in (1, -1):
        x = torch.full((4, 64), 3.0 * sign)
        expected = x.double() @ weight.t().double()
        assert distance(quantized(weight, bits).multiply(x), expected) < 1e-6


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_matrix_is_quantized_from_any_dtype(bits: int, dtype: torch.dtype) -> None:
    weight, x = numbers(48, 96).to(dtype), numbers(2, 96)
    same = quantized(weight.float(), bits).multiply(x)
    assert torch.equal(quantized(weight, bits).multiply(x), same)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_threads_change_nothing(bits: int) -> None:
    weight, x = numbers(2000, 1024), numbers(3, 1024)
    alone = quantized(weight, bits).multiply(x)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(quantized(weight, bits).multiply(x), alone)
    finally:
        torch.set_num_threads(threads)


def test_not_a_number_stays_visible() -> None:
    x = torch.ones(1, 64)
    x[0, 3] = torch.nan
    assert torch.isnan(quantized(numbers(16, 64), 16).multiply(x)).all()
