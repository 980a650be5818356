"""Between torch and the wire: dtype, shape, little-endian bytes. The only torch in this package."""

import sys

import numpy as np
import torch
from torch import Tensor

from cake.protocol.messages import ITEM_SIZES, Buffer, WireTensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def to_wire(tensor: Tensor) -> WireTensor:
    """Describe a tensor for sending; its bytes are not copied if it lies in CPU memory in order."""
    name = NAMES[tensor.dtype]
    if not tensor.numel():
        return WireTensor(name, tuple(tensor.shape), b"")
    data = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return WireTensor(name, tuple(tensor.shape), _little_endian(data, ITEM_SIZES[name]))


def from_wire(wire: WireTensor) -> Tensor:
    """The tensor that was sent, on the CPU; shares the bytes, which must be writable."""
    dtype = DTYPES[wire.dtype]
    if not wire.data:
        return torch.empty(wire.shape, dtype=dtype)
    data = _little_endian(wire.data, ITEM_SIZES[wire.dtype])
    return torch.frombuffer(data, dtype=dtype).view(wire.shape)


def _little_endian(data: Buffer, item_size: int) -> Buffer:
    """Swap the bytes of each element on a host that is not little-endian itself."""
    if sys.byteorder == "little":
        return data
    return np.frombuffer(data, dtype=f"u{item_size}").byteswap().view("u1").data
