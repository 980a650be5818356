"""The reader, held against the `safetensors` package, and what it says of damaged files."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cake.errors import CheckpointError
from cake.weights import safetensors_files
from cake.weights.safetensors_files import SafetensorsFile, TensorEntry, read_header

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(), (1,), (0,), (3, 0, 2), (7,), (2049,), (31, 17), (2, 3, 4, 5), (64, 257)]


def random_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{dtype}-{shape}".replace("torch.", ""): (10 * torch.randn(shape, generator=generator)).to(dtype)
        for dtype in FLOATS
        for shape in SHAPES
    }


def read(file: SafetensorsFile, name: str, dtype: torch.dtype) -> Tensor:
    # NaN everywhere, so that what is not written shows.
    destination = torch.full(file.entries[name].shape, float("nan"), dtype=dtype)
    file.read_into(name, destination)
    return destination


@pytest.mark.parametrize("window", [8, 24, 1000, 4096, 4104, 65536, None])
def test_same_as_the_safetensors_package(
    window: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if window:
        monkeypatch.setattr(safetensors_files, "WINDOW_BYTES", window)
    save_file(random_tensors(), tmp_path / "m.safetensors", metadata={"format": "pt"})
    expected = load_file(tmp_path / "m.safetensors")
    file = SafetensorsFile(tmp_path / "m.safetensors")
    assert file.entries.keys() == expected.keys() == random_tensors().keys()
    for name, tensor in expected.items():
        if window == 8 and tensor.numel() > 300:
            continue  # thousands of mappings that show nothing new
        assert file.entries[name].shape == tuple(tensor.shape)
        assert torch.equal(read(file, name, tensor.dtype), tensor), name


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_conversion_is_that_of_torch(source: torch.dtype, target: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.cat((torch.randn(999, dtype=torch.float64), torch.tensor([0.0, 1e-30, 7e4, -1e39])))
    tensor = tensor.to(source)
    save_file({"x": tensor}, tmp_path / "m.safetensors")
    result = read(SafetensorsFile(tmp_path / "m.safetensors"), "x", target)
    assert result.dtype == target
    assert torch.equal(result, tensor.to(target))


def test_larger_than_the_real_window(tmp_path: Path) -> None:
    n = safetensors_files.WINDOW_BYTES // 4 + 1000
    tensor = torch.arange(n, dtype=torch.int32).view(torch.float32).nan_to_num()
    save_file({"small": torch.ones(3), "x": tensor}, tmp_path / "m.safetensors")
    file = SafetensorsFile(tmp_path / "m.safetensors")
    assert [len(w) for w in file.windows(file.entries["x"])] == [safetensors_files.WINDOW_BYTES, 4000]
    assert torch.equal(read(file, "x", torch.float32), tensor)


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: Any, end: Any, shape: Any = (1,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize("padding", range(8))
def test_data_that_begins_at_any_byte(padding: int, tmp_path: Path) -> None:
    tensor = torch.randn(5, dtype=torch.float64)
    text = json.dumps({"x": entry(0, 40, [5], "F64")}).encode() + b" " * padding
    path = write(tmp_path / "m.safetensors", text, tensor.numpy().tobytes())
    assert torch.equal(read(SafetensorsFile(path), "x", torch.float64), tensor)


def test_entries_name_the_bytes_of_the_file(tmp_path: Path) -> None:
    header = {"a": entry(0, 4), "__metadata__": {"format": "pt"}, "b": entry(4, 6, [2, 1], "I8")}
    path = write(tmp_path / "m.safetensors", header, b"abcdef")
    start = 8 + len(json.dumps(header))
    assert read_header(path) == {
        "a": TensorEntry("F32", (1,), start, start + 4),
        "b": TensorEntry("I8", (2, 1), start + 4, start + 6),
    }
    file = SafetensorsFile(path)
    assert file.bytes_at(file.entries["b"], 0, 2) == b"ef"
    assert file.bytes_at(file.entries["a"], 1, 2) == b"bc"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors cannot be read: No such file"):
        read_header(tmp_path / "none.safetensors")


@pytest.mark.parametrize("content", [b"", b"\0", b"1234567"])
def test_too_short_for_a_header(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"offset 0: the file has only {len(content)} bytes") as raised:
        read_header(path)
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize("length", [3, 2**31, 2**63, 2**64 - 1])
def test_header_length_beyond_the_file(length: int, tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", b"{}", length=length)
    with pytest.raises(CheckpointError, match=f"offset 0: a header of {length} bytes cannot be in 10 bytes"):
        read_header(path)


NOT_A_MAP = [
    b"",
    b"nonsense",
    b'{"a": ',
    b"\xff\xfe{}",
    b"[]",
    b"[1]",
    b"5",
    b'"text"',
    b"null",
    b"[" * 99999,
]


@pytest.mark.parametrize("header", NOT_A_MAP, ids=lambda header: repr(header[:10]))
def test_header_that_is_no_json_map(header: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", header)
    with pytest.raises(CheckpointError, match=r"m\.safetensors is damaged at offset 8: .* not a JSON map"):
        read_header(path)


BAD_ENTRIES: dict[str, object] = {
    "no map": 5,
    "a list": ["F32", [1], [0, 4]],
    "no dtype": {"shape": [1], "data_offsets": [0, 4]},
    "no shape": {"dtype": "F32", "data_offsets": [0, 4]},
    "no offsets": {"dtype": "F32", "shape": [1]},
    "one offset": {"dtype": "F32", "shape": [1], "data_offsets": [0]},
    "shape a number": entry(0, 4, 1),
    "shape of text": entry(0, 4, "11"),
    "negative size": entry(0, 4, [-1, -1]),
    "half a size": entry(0, 4, [0.5, 2]),
    "negative offset": entry(-4, 0),
    "offset as truth": entry(False, 4),
    "end before start": entry(8, 4),
}


@pytest.mark.parametrize("fields", BAD_ENTRIES.values(), ids=BAD_ENTRIES.keys())
def test_malformed_entry(fields: object, tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", {"good": entry(0, 4), "bad": fields}, bytes(16))
    with pytest.raises(CheckpointError, match="offset 8: the header's entry for bad is malformed"):
        read_header(path)


def test_truncated_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4), "b": torch.zeros(4)}, tmp_path / "m.safetensors")
    content = (tmp_path / "m.safetensors").read_bytes()
    size = len(content) - 1
    (tmp_path / "m.safetensors").write_bytes(content[:size])
    message = f"damaged at offset {size}: b lies at bytes {size - 15} to {size + 1}; the file is truncated"
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("fields", "expected", "found"),
    [
        (entry(0, 8, [3]), 12, 8),
        (entry(0, 8, [1]), 4, 8),
        (entry(0, 8, [], "F64"), 8, None),
        (entry(0, 8, [], "BF16"), 2, 8),
        (entry(0, 8, [0, 5]), 0, 8),
        (entry(0, 8, [10**12, 10**12]), 4 * 10**24, 8),
    ],
)
def test_wrong_byte_count(fields: object, expected: int, found: int | None, tmp_path: Path) -> None:
    header = {"x": fields}
    path = write(tmp_path / "m.safetensors", header, bytes(8))
    if found is None:
        assert read_header(path)["x"].shape == ()
        return
    offset = 8 + len(json.dumps(header))
    with pytest.raises(
        CheckpointError, match=f"offset {offset}: x should take {expected} bytes, not {found}"
    ):
        read_header(path)
