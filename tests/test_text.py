"""Sizes as people write them."""

import pytest

from cake.text import parse_bytes


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("0", 0),
        ("1234", 1234),
        ("500MB", 500_000_000),
        ("2 gb", 2_000_000_000),
        ("2g", 2_000_000_000),
        ("1.5GiB", 3 << 29),
        ("4kib", 4096),
        ("1TB", 10**12),
    ],
)
def test_sizes(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "lots", "-1GB", "2XB", "1e9", "1,5GB", "iB", "5iB", "GB", "nan", "1GBs"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no size; say 500MB, 2GB or 1\.5GiB"):
        parse_bytes(text)


def test_the_command_line_says_so(cli) -> None:
    result = cli("--cache-memory", "lots")
    assert result.exit_code == 2
    assert "'--cache-memory': 'lots' is no size; say 500MB, 2GB or 1.5GiB." in result.stderr


def test_a_budget_too_small_for_any_session_is_refused_in_one_line(cli) -> None:
    result = cli("--cache-memory", "1kB", "--prompt", "Hello", "--threads", "1")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(
        "Error: the 1.0 kB for caches hold 0 tokens of a session"
    )
