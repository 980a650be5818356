"""Small things that several rooms print, or read, the same way."""

import re
from collections.abc import Sequence

UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text with their cells below one another."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def human_bytes(n_bytes: float) -> str:
    """`1.3 GB` and the like, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} GB"


def parse_bytes(text: str) -> int:
    """The bytes that `500MB`, `2 GB` (powers of 1000) or `1.5GiB` (of 1024) say; `ValueError` for others."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{text!r} is no size; say 500MB, 2GB or 1.5GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** UNITS[match[2].lower()])
