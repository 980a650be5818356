"""What a process computes on and in, from a person's options."""

import asyncio
import logging
import threading

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


async def test_the_loop_computes_only_when_nothing_waits_and_no_other_threads_are_needed() -> None:
    placement = device.Placement(torch.device("cpu"), torch.float32)
    alone, two = device.DeviceThread(placement, 1), device.DeviceThread(placement, 2)
    assert alone.may_stay_out
    assert not two.may_stay_out
    go_on = threading.Event()
    waiting = asyncio.create_task(alone.run(go_on.wait))
    await asyncio.sleep(0)
    assert not alone.may_stay_out
    go_on.set()
    await waiting
    assert alone.may_stay_out
    assert alone.run_here(torch.is_inference_mode_enabled)
    assert not torch.is_inference_mode_enabled()
    alone.close()
    assert not alone.may_stay_out
    with pytest.raises(device.StoppedError):
        alone.run_here(int)


async def test_who_is_cancelled_while_waiting_is_not_counted_for_ever() -> None:
    thread = device.DeviceThread(device.Placement(torch.device("cpu"), torch.float32), 1)
    go_on = threading.Event()
    first, second = asyncio.create_task(thread.run(go_on.wait)), asyncio.create_task(thread.run(int))
    await asyncio.sleep(0)
    second.cancel()
    go_on.set()
    await asyncio.wait({first, second})
    await thread.run(int)
    assert thread.may_stay_out


def test_what_is_seen_right_after_computing_came_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    thread = device.DeviceThread(device.Placement(torch.device("cpu"), torch.float32), 1)
    clock = iter((5.0, 5.5))
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(clock))
    thread.run_here(int)
    assert thread.came_s(5.5002) == 5.0
    assert thread.came_s(5.6) == 5.6
    assert thread.came_s(4.9) == 4.9
