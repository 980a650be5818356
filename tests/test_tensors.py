"""Tensors on the wire: bit for bit, little-endian, in row-major order."""

import struct
from pathlib import Path

import pytest
import torch

import cake
from cake.errors import ProtocolError
from cake.protocol.messages import WireTensor
from cake.protocol.tensors import DTYPES, SMALL, from_wire, to_wire

INTEGERS = {"float32": torch.int32, "bfloat16": torch.int16, "float16": torch.int16}
# 1.0, -2.0, -0.0, the smallest denormal, inf, a quiet and a signalling NaN with payloads
BITS = {
    "float32": [0x3F800000, -0x40000000, -0x80000000, 1, 0x7F800000, 0x7FC12345, 0x7F800001],
    "bfloat16": [0x3F80, -0x4000, -0x8000, 1, 0x7F80, 0x7FD5, 0x7F81],
    "float16": [0x3C00, -0x4000, -0x8000, 1, 0x7C00, 0x7E55, 0x7C01],
}
WIRE = {
    "float32": "0000803f 000000c0 00000080 01000000 0000807f 4523c17f 0100807f",
    "bfloat16": "803f 00c0 0080 0100 807f d57f 817f",
    "float16": "003c 00c0 0080 0100 007c 557e 017c",
}


def bits(tensor: torch.Tensor) -> list[int]:
    integer = torch.int32 if tensor.dtype.itemsize == 4 else torch.int16
    return tensor.contiguous().view(integer).flatten().tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_literal_bytes_both_ways(dtype: str) -> None:
    tensor = torch.tensor(BITS[dtype], dtype=INTEGERS[dtype]).view(DTYPES[dtype])
    wire = to_wire(tensor)
    assert (wire.dtype, wire.shape) == (dtype, (7,))
    assert bytes(wire.data) == bytes.fromhex(WIRE[dtype])
    back = from_wire(WireTensor(dtype, (7,), bytearray.fromhex(WIRE[dtype])))
    assert back.dtype == DTYPES[dtype]
    assert bits(back) == BITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_that_does_not_lie_in_order(dtype: str) -> None:
    tensor = torch.arange(24, dtype=DTYPES[dtype]).reshape(4, 6).t()[1:5:2]
    assert not tensor.is_contiguous()
    back = from_wire(to_wire(tensor))
    assert back.shape == (2, 4)
    assert torch.equal(back, tensor)
    assert back.tolist() == [[1, 7, 13, 19], [3, 9, 15, 21]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0), (), (1, 1, 1)])
def test_empty_and_unusual_shapes(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape, dtype=DTYPES[dtype])
    wire = to_wire(tensor)
    assert len(wire.data) == tensor.numel() * tensor.dtype.itemsize
    back = from_wire(wire)
    assert back.shape == shape
    assert torch.equal(back, tensor)


def test_sending_does_not_copy_what_lies_in_order() -> None:
    tensor = torch.zeros(2, SMALL)
    wire = to_wire(tensor)
    tensor[0, 0] = 1.0
    assert bytes(wire.data[:8]) == bytes.fromhex("0000803f") + bytes(4)


def test_a_tensor_that_wants_a_gradient() -> None:
    assert bytes(to_wire(torch.ones(1, requires_grad=True)).data) == bytes.fromhex("0000803f")


@pytest.mark.parametrize("name", DTYPES)
def test_another_dtype_for_the_wire(name: str) -> None:
    tensor = torch.randn(3, 5)
    wire = to_wire(tensor, name)
    assert wire.dtype == name
    assert torch.equal(from_wire(wire), tensor.to(DTYPES[name]))


# int8.


def through_int8(tensor: torch.Tensor) -> torch.Tensor:
    """As it arrives, having been sent in int8."""
    wire = to_wire(tensor, "int8")
    return from_wire(WireTensor("int8", wire.shape, bytearray(wire.data)))


def outliers(n_tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """States like Llama's: around 1, three channels hundreds of times as large."""
    hidden = torch.randn(n_tokens, width, generator=torch.Generator().manual_seed(seed))
    for channel, factor in ((2, 300.0), (29, -900.0), (56, 40.0)):
        hidden[:, channel : channel + 1] *= factor
    return hidden


def test_the_documentation_shows_int8_as_it_is_sent() -> None:
    text = (Path(cake.__file__).parent / "protocol" / "PROTOCOL.md").read_text(encoding="utf-8")
    block = next(part for part in text.split("```") if part.lstrip().startswith("80 3f"))
    values = [[0.0, 1.0, -2.0, 127.0, -127.0, 63.5, 1000.0, 0.4, 0.6, -0.6]]
    assert bytes(to_wire(torch.tensor(values), "int8").data) == bytes.fromhex(block)


def test_literal_bytes_of_int8() -> None:
    """Ten channels: one group, one of them exact."""
    values = [0.0, 1.0, -2.0, 127.0, -127.0, 63.5, 1000.0, 0.4, 0.6, -0.6]
    tensor = torch.tensor([values, [0.0] * 10])
    scales = "803f 0000"  # 1.0, 0.0
    channels, exact = bytes.fromhex("0600"), bytes.fromhex("7a44")  # channel 6 is 1000.0
    data = bytes(to_wire(tensor, "int8").data)
    assert len(data) == 2 * (2 + 4 + 10)
    assert data[:4] == bytes.fromhex(scales)
    assert (data[4:6], data[8:10]) == (channels, exact)
    assert data[10:12] == bytes(2)
    numbers = struct.unpack("10b", data[12:22])
    assert numbers[:6] == (0, 1, -2, 127, -127, 64)
    assert numbers[7:] == (0, 1, -1)
    assert data[22:] == bytes(10)
    back = through_int8(tensor)
    assert back.dtype == torch.float32
    assert back.tolist() == [[0, 1, -2, 127, -127, 64, 1000, 0, 1, -1], [0] * 10]


@pytest.mark.parametrize("width", [1, 7, 8, 63, 64, 65, 200, 576])
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_the_error_of_int8(width: int, dtype: torch.dtype) -> None:
    """Half a step of the group's scale, which bfloat16 rounds by 1/256."""
    tensor = outliers(5, width).to(dtype)
    back, tensor = through_int8(tensor), tensor.float()
    exact = torch.zeros_like(tensor).scatter_(1, tensor.abs().topk(min(8, width // 8)).indices, 1.0).bool()
    assert torch.equal(back[exact], tensor.bfloat16().float()[exact])
    rest = torch.where(exact, 0.0, tensor)
    for group, got in zip(rest.split(64, 1), back.split(64, 1), strict=True):
        step = group.abs().amax(1, keepdim=True) / 127
        error = torch.where(group == 0, 0.0, got - group).abs()
        assert (error <= step * (0.5 + 127 / 256)).all()


def test_outliers_leave_their_neighbours_alone() -> None:
    tensor = outliers(4, 576)
    error = (through_int8(tensor) - tensor).abs()
    assert error[tensor.abs() < 10].max() < 0.03
    assert (error / tensor.abs())[tensor.abs() >= 10].max() < 1 / 256


def test_each_token_is_encoded_alone() -> None:
    tensor = outliers(130, 200)
    alone = torch.cat([through_int8(row) for row in tensor.split(1)])
    assert torch.equal(through_int8(tensor), alone)


def test_zeros_are_zeros_in_int8() -> None:
    assert torch.equal(through_int8(torch.zeros(2, 130)), torch.zeros(2, 130))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("n_wrong", [1, 9])
def test_what_is_not_finite_stays_so(wrong: float, n_wrong: int) -> None:
    tensor = outliers(3, 192)
    tensor[1, :n_wrong] = wrong
    back = through_int8(tensor)
    assert not back[1, :n_wrong].isfinite().any()
    assert back[[0, 2]].isfinite().all()
    assert back[1, 64:].isfinite().all()


@pytest.mark.parametrize("value", [1e-45, 1e-38, 3e38])
def test_the_ends_of_float32_in_int8(value: float) -> None:
    back = through_int8(torch.full((1, 64), value))
    assert torch.allclose(back, torch.full((1, 64), value), rtol=0.02, atol=1e-38)


@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0), (), (1, 1, 1), (2, 3, 70)])
def test_shapes_in_int8(shape: tuple[int, ...]) -> None:
    back = through_int8(torch.ones(shape))
    assert back.shape == shape
    assert torch.allclose(back, torch.ones(shape), rtol=1 / 256)


def test_a_channel_that_is_not_there() -> None:
    data = bytearray(to_wire(torch.ones(1, 8), "int8").data)
    data[2:4] = (8).to_bytes(2, "little")
    with pytest.raises(ProtocolError, match="a tensor names channels beyond its 8"):
        from_wire(WireTensor("int8", (1, 8), data))


def test_any_bytes_of_int8_can_be_read() -> None:
    """Scales that are negative, infinite or NaN give what multiplying by them gives."""
    for pattern in (b"\x80\xff", b"\x80\x7f", b"\xff\xff", b"\x80\xbf"):
        data = bytearray(to_wire(torch.ones(1, 7), "int8").data)
        data[:2] = pattern
        assert from_wire(WireTensor("int8", (1, 7), data)).shape == (1, 7)
