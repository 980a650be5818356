"""The bar that shows how far loading is."""

from typing import NoReturn

from tqdm import tqdm


def loading_bar(total: int) -> "tqdm[NoReturn]":
    """For so many bytes, with their rate; it shows itself when two seconds have passed."""
    return tqdm(total=total, desc="loading", unit="B", unit_scale=True, delay=2, leave=False)
