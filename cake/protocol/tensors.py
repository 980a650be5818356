"""Between torch and the wire: dtype, shape, little-endian bytes. The only torch in this package.

Hidden states in int8 have a scale for each token and group of channels. A few channels of Llama's are
hundreds of times larger than the others, and with a scale in common little would remain of their
neighbours; so each token's largest channels travel beside the others, in bfloat16. On the demo model, cut
in two, that makes the KL divergence 25 times smaller, for half a bit a channel.
"""

import ctypes
import sys
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from cake.errors import ProtocolError
from cake.protocol.int8_layout import GROUP, Int8Layout
from cake.protocol.messages import Buffer, WireTensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SMALL = 64 * 1024  # bytes that are copied sooner than looked at through numpy
ROWS = 64  # encoded at once: what lies between the steps then stays in the processor's cache


def to_wire(tensor: Tensor, dtype: str | None = None) -> WireTensor:
    """Describe a tensor for sending, in its own dtype or another of the wire's.

    In its own its bytes are not copied, unless they are few, if it lies in CPU memory in order.
    """
    shape = tuple(tensor.shape)
    if dtype == "int8":
        return WireTensor("int8", shape, _to_int8(tensor.detach().cpu().float(), Int8Layout.of(shape)))
    own = NAMES[tensor.dtype]
    name = dtype or own
    return WireTensor(name, shape, _bytes_of(tensor if name == own else tensor.to(DTYPES[name])))


def from_wire(wire: WireTensor) -> Tensor:
    """The tensor that was sent, on the CPU; shares the bytes, which must be writable.

    What was sent in int8 is float32 here, and shares nothing. Raises `ProtocolError` where it names
    channels that a row does not have.
    """
    if wire.dtype == "int8":
        return _from_int8(wire.data, Int8Layout.of(wire.shape)).view(wire.shape)
    return _tensor_of(wire.data, DTYPES[wire.dtype]).view(wire.shape)


def _to_int8(tensor: Tensor, layout: Int8Layout) -> Buffer:
    if not tensor.numel():
        return b""
    rows = torch.split(tensor.reshape(layout.rows, layout.width), ROWS)
    parts = zip(*(_int8_parts(some, layout) for some in rows), strict=True)
    return b"".join([_bytes_of(piece) for part in parts for piece in part])


def _int8_parts(hidden: Tensor, layout: Int8Layout) -> tuple[Tensor, ...]:
    """Of rows of float32; each alone gives the same. A group with an infinity or a NaN becomes NaN."""
    sizes = hidden.abs()
    channels = sizes.topk(layout.exact, sorted=False).indices  # [rows, exact]; NaN counts as largest
    largest = _grouped(sizes.scatter_(1, channels, 0.0), layout.groups).amax(2, keepdim=True)
    scales = (largest / 127).bfloat16()  # [rows, groups, 1]
    numbers = (_grouped(hidden, layout.groups) / scales.float()).nan_to_num_(0.0).round_().clamp_(-127, 127)
    numbers = numbers.to(torch.int8).view(len(hidden), -1)[:, : layout.width]
    return scales, channels.to(torch.int16), hidden.gather(1, channels).bfloat16(), numbers


def _grouped(rows: Tensor, groups: int) -> Tensor:
    """`[rows, groups, GROUP]`, the last group filled up with zeros."""
    missing = groups * GROUP - rows.shape[1]
    return (torch.nn.functional.pad(rows, (0, missing)) if missing else rows).view(-1, groups, GROUP)


def _from_int8(data: Buffer, layout: Int8Layout) -> Tensor:
    rows, width, groups, exact = layout
    if not data:
        return torch.empty(0)
    lengths = (2 * rows * groups, 2 * rows * exact, 2 * rows * exact, rows * width)
    pieces = [memoryview(data)[end - n : end] for n, end in zip(lengths, accumulate(lengths), strict=True)]
    scales, channels, values, numbers = map(_tensor_of, pieces, PARTS)
    chosen = channels.view(rows, exact).long() & 0xFFFF
    if chosen.numel() and chosen.max() >= width:
        raise ProtocolError(f"a tensor names channels beyond its {width}")
    grouped = _grouped(numbers.view(rows, width), groups) * scales.view(rows, groups, 1).float()
    hidden = grouped.view(rows, -1)[:, :width].contiguous()
    return hidden.scatter_(1, chosen, values.view(rows, exact).float())


PARTS = (torch.bfloat16, torch.int16, torch.bfloat16, torch.int8)


def _bytes_of(tensor: Tensor) -> Buffer:
    if not tensor.numel():
        return b""
    if tensor.nbytes <= SMALL and tensor.is_cpu and tensor.is_contiguous():
        copy = bytearray(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))
        return _little_endian(copy, tensor.itemsize)
    data = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return _little_endian(data, tensor.dtype.itemsize)


def _tensor_of(data: Buffer, dtype: torch.dtype) -> Tensor:
    """One dimension."""
    if not data:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(_little_endian(data, dtype.itemsize), dtype=dtype)


def _little_endian(data: Buffer, item_size: int) -> Buffer:
    """Swap the bytes of each element on a host that is not little-endian itself."""
    if sys.byteorder == "little":
        return data
    return np.frombuffer(data, dtype=f"u{item_size}").byteswap().view("u1").data
