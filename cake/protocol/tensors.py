"""Between torch and the wire: dtype, shape, little-endian bytes. The only torch in this package."""

import numpy as np
import torch
from torch import Tensor

from cake.protocol.messages import WireTensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Integers of the same size carry the bits: numpy has no bfloat16, and byte order is about bytes.
INTEGERS = {4: (torch.int32, "<i4"), 2: (torch.int16, "<i2")}


def to_wire(tensor: Tensor) -> WireTensor:
    """Describe a tensor for sending; its bytes are not copied if it lies in CPU memory in order."""
    integer, order = INTEGERS[tensor.dtype.itemsize]
    bits = tensor.detach().cpu().contiguous().view(integer).numpy().astype(order, copy=False)
    return WireTensor(NAMES[tensor.dtype], tuple(tensor.shape), bits.reshape(-1).view("u1").data)


def from_wire(wire: WireTensor) -> Tensor:
    """The tensor that was sent, on the CPU; shares the bytes where it can."""
    _, order = INTEGERS[DTYPES[wire.dtype].itemsize]
    native = np.dtype(order).newbyteorder("=")
    bits = np.frombuffer(wire.data, dtype=order).astype(native, copy=False)
    return torch.from_numpy(bits).view(DTYPES[wire.dtype]).reshape(wire.shape)
