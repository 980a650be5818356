"""What a process computes on and in, from a person's options."""

import logging

import pytest
import torch

from cake import device
from cake.device import choose_placement
from cake.options import ComputeOptions


def options(**changes: object) -> ComputeOptions:
    chosen = {
        "model": None,
        "dtype": None,
        "quantize": "none",
        "device": "cpu",
        "threads": 1,
        "context": None,
        "cache_memory": None,
    }
    return ComputeOptions(**{**chosen, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("computes_bfloat16", [True, False])
def test_a_cpu_computes_in_what_it_is_best_at(
    computes_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device.kernels, "cpu_computes_bfloat16", lambda: computes_bfloat16)
    best = torch.bfloat16 if computes_bfloat16 else torch.float32
    assert choose_placement(options(), "bfloat16").dtype == best
    assert choose_placement(options(quantize="int4"), "bfloat16").dtype == torch.float32
    assert choose_placement(options(quantize="int4", dtype="bfloat16"), "x").dtype == torch.bfloat16


def test_missing_kernels_are_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(device.kernels, "library", lambda: None)
    with caplog.at_level(logging.WARNING):
        placement = choose_placement(options(quantize="int8"), "float32")
    assert placement.quantize == "int8"
    assert "CPU kernels were not built" in caplog.text
    assert "C compiler" in caplog.text
