"""In what hidden states travel: the person's choice, else what trips before have shown of the link."""

import logging

import pytest

from cake.wire_dtype import Trip, WireDtype

N_BYTES = 64 * 2048 * 2  # of 64 tokens, one way in bfloat16
MBIT = 1e6 / 8
GREETING_S = 0.01


def seen(wire: WireDtype, rate: float, compute_s: float, alone: bool = True, n_bytes: int = N_BYTES) -> None:
    """A part of a prompt goes there and back over a link of `rate` bytes per second."""
    network_s = GREETING_S + 2 * n_bytes / rate
    wire.observe(Trip(64, 2 * n_bytes, network_s + compute_s, compute_s), N_BYTES, alone)


def of_prompt(wire: WireDtype) -> str:
    return wire.choose(64, N_BYTES, "bfloat16")


def automatic() -> WireDtype:
    return WireDtype("porch", None, GREETING_S)


def test_before_anything_is_known() -> None:
    assert of_prompt(automatic()) == "bfloat16"


@pytest.mark.parametrize(
    ("rate", "compute_s", "expected"),
    [
        (50 * MBIT, 0.030, "int8"),  # 42 ms one way
        (50 * MBIT, 0.060, "bfloat16"),
        (1000 * MBIT, 0.001, "bfloat16"),  # 2 ms, which nobody notices
        (5 * MBIT, 0.200, "int8"),
    ],
)
def test_the_slower_of_link_and_worker_decides(rate: float, compute_s: float, expected: str) -> None:
    wire = automatic()
    seen(wire, rate, compute_s)
    assert of_prompt(wire) == expected


def test_tokens_that_are_generated_stay_as_they_are() -> None:
    wire = automatic()
    seen(wire, 5 * MBIT, 0.001)
    assert wire.choose(16, N_BYTES, "float32") == "float32"
    assert wire.choose(17, N_BYTES, "float32") == "int8"


@pytest.mark.parametrize("chosen", ["float32", "bfloat16", "float16", "int8"])
def test_a_choice_always_wins(chosen: str) -> None:
    wire = WireDtype("porch", chosen, GREETING_S)
    assert [of_prompt(wire), wire.choose(1, 4096, "bfloat16")] == [chosen] * 2
    seen(wire, 5 * MBIT, 0.001)
    assert of_prompt(wire) == chosen


def test_int8_does_not_hide_that_the_link_is_slow() -> None:
    wire = automatic()
    for _ in range(8):
        seen(wire, 50 * MBIT, 0.030, n_bytes=N_BYTES // 2)
        assert of_prompt(wire) == "int8"


def test_what_waited_for_others_says_nothing_of_the_link() -> None:
    wire = automatic()
    seen(wire, 5 * MBIT, 0.001, alone=False)
    assert of_prompt(wire) == "bfloat16"


def test_a_hiccup_is_forgiven_by_the_next_trip_and_a_link_that_has_become_slow_is_noticed() -> None:
    wire = automatic()
    seen(wire, 5 * MBIT, 0.001)
    seen(wire, 1000 * MBIT, 0.001)
    assert of_prompt(wire) == "bfloat16"
    for _ in range(4):
        seen(wire, 5 * MBIT, 0.001)
    assert of_prompt(wire) == "int8"


def test_a_distant_worker_is_not_a_slow_link() -> None:
    """A round trip of 300 ms; that of the handshake was even slower."""
    wire = WireDtype("porch", None, 0.4)
    wire.observe(Trip(1, 8192, 0.305, 0.005), 4096, True)
    wire.observe(Trip(64, 2 * N_BYTES, 0.3 + 0.005 + 0.020, 0.020), N_BYTES, True)
    assert of_prompt(wire) == "bfloat16"


def test_the_change_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cake")
    wire = automatic()
    seen(wire, 50 * MBIT, 0.030)
    assert [of_prompt(wire), of_prompt(wire)] == ["int8", "int8"]
    assert caplog.messages == [
        "the link to worker 'porch' (50 Mbit/s) is slower than the worker: prompts go to it in int8 from now "
        "on (--wire-dtype bfloat16 keeps them exact)"
    ]
