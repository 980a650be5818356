"""The device that a process computes on: which one, in what numbers, and the thread that runs it."""

import asyncio
import atexit
import contextlib
import functools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from cake import kernels
from cake.errors import CakeError
from cake.model.linear import Placement
from cake.neighbours import announce_threads
from cake.options import ComputeOptions
from cake.protocol.tensors import DTYPES

DEFAULT_CONTEXT = 8192
EXIT_S = 5.0
AFTERWARDS_S = 1e-3

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


def available_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_device(name: str | None) -> torch.device:
    """The device called `name`, or the best present. Raises `CakeError` if it is not there."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        present = f"cpu, {accelerator.type}" if accelerator else "cpu"
        raise CakeError(f"the device {name!r} is not here; present: {present}") from error
    return device


def choose_dtype(name: str | None, checkpoint_dtype: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`; else the checkpoint's on an accelerator, the CPU's best on a CPU."""
    if name is not None:
        return DTYPES[name]
    if device.type != "cpu":
        return DTYPES.get(checkpoint_dtype, torch.float32)
    return torch.bfloat16 if kernels.cpu_computes_bfloat16() else torch.float32


def choose_placement(compute: ComputeOptions, checkpoint_dtype: str) -> Placement:
    """Where and how this process computes, from the person's options and what is present."""
    device = choose_device(compute.device)
    if device.type == "cpu" and kernels.library() is None:
        log.warning(
            "Cake's own CPU kernels were not built (that takes a C compiler when Cake is installed); "
            "torch's serve, which are slower"
        )
    dtype = choose_dtype(compute.dtype, checkpoint_dtype, device)
    if compute.dtype is None and compute.quantize != "none" and device.type == "cpu":
        dtype = torch.float32  # in which the kernels for quantized weights take and give activations
    return Placement(device, dtype, compute.quantize)


def choose_context(chosen: int | None, of_model: int) -> int:
    """Tokens that a session may hold: the choice, else the model's own, at most 8192."""
    if chosen is None:
        return min(of_model, DEFAULT_CONTEXT)
    if chosen > of_model:
        raise CakeError(f"--context {chosen} is more than the {of_model} that the model was made for")
    return chosen


class StoppedError(Exception):
    """The work was abandoned because the process is ending."""


class DeviceThread:
    """The one thread in which a process runs torch, so that the event loop always answers.

    Work is done in the order in which it was handed in. A bare queue, because an executor's futures
    and locks cost a tenth of a millisecond there and back, for every token in every stage.
    """

    def __init__(self, placement: Placement, threads: int | None = None) -> None:
        self.placement = placement
        self._stopping = threading.Event()
        self._threads = threads or available_cores()
        crowded = (
            announce_threads(self._threads, available_cores()) if placement.device.type == "cpu" else None
        )
        if crowded:
            log.warning("%s", crowded)
        # The caller's thread converts and copies a little; a second pool of threads for that would
        # only get in the way of the device's own.
        torch.set_num_threads(1)
        self._n_handed_in = 0  # and not done
        self._here_s = (0.0, 0.0)  # when `run_here` began and ended last
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)
        self._thread.start()
        atexit.register(self._join)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` in the thread, without autograd, and wait for what it returns.

        Raises `StoppedError` once `close` was called.
        """
        self.check()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def settle(how: Callable[[], object]) -> None:
            self._n_handed_in -= 1
            if not done.done():
                how()

        def call() -> None:
            try:
                if done.cancelled():
                    raise asyncio.CancelledError
                self.check()
                how = functools.partial(done.set_result, function(*args, **kwargs))
            except BaseException as error:
                how = functools.partial(done.set_exception, error)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, how)

        self._n_handed_in += 1
        self._queue.put(call)
        return await done

    @property
    def may_stay_out(self) -> bool:
        """Whether the event loop's thread may compute itself: none waits, and it needs no other threads.

        Those of OpenMP belong to the thread that they compute for, and two lots get in one another's way.
        """
        free = not self._n_handed_in and not self._stopping.is_set()
        return free and (self._threads == 1 or self.placement.device.type != "cpu")

    def run_here(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` in the event loop's thread, where that `may_stay_out`."""
        self.check()
        began_s = time.perf_counter()
        try:
            if torch.is_inference_mode_enabled():  # for good, as in a worker: entering takes its time
                return function(*args, **kwargs)
            with torch.inference_mode():
                return function(*args, **kwargs)
        finally:
            self._here_s = began_s, time.perf_counter()

    def came_s(self, seen_s: float) -> float:
        """Since when that may have been there which the event loop saw at that moment.

        What it saw right after it had computed came meanwhile.
        """
        began_s, ended_s = self._here_s
        return began_s if ended_s <= seen_s < ended_s + AFTERWARDS_S else seen_s

    def check(self) -> None:
        """Called between the parts of long work; raises `StoppedError` once `close` was called."""
        if self._stopping.is_set():
            raise StoppedError

    def synchronize(self) -> None:
        """Wait until an accelerator has done what it was given, so that times are true."""
        if self.placement.device.type != "cpu":
            torch.accelerator.synchronize(self.placement.device)

    def close(self) -> None:
        """Abandon what waits and, at its next `check`, what runs."""
        self._stopping.set()
        self._queue.put(None)

    def _join(self) -> None:
        """At the program's end: torch must not compute while it is taken apart."""
        self.close()
        self._thread.join(EXIT_S)

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while (call := self._queue.get()) is not None:
                call()
                del call  # with its result, which may be large
