"""Tensors on the wire: bit for bit, little-endian, in row-major order."""

import pytest
import torch

from cake.protocol.messages import WireTensor
from cake.protocol.tensors import DTYPES, from_wire, to_wire

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
    tensor = torch.zeros(2, 2)
    wire = to_wire(tensor)
    tensor[0, 0] = 1.0
    assert bytes(wire.data) == bytes.fromhex("0000803f") + bytes(12)


def test_a_tensor_that_wants_a_gradient() -> None:
    assert bytes(to_wire(torch.ones(1, requires_grad=True)).data) == bytes.fromhex("0000803f")
