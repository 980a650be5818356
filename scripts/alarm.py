"""Being called at a moment of an event loop's clock, and not up to a millisecond after it.

On Linux asyncio waits in whole milliseconds, rounded up. A timer that the kernel keeps as a file costs
nothing while it waits and is late only by what waking takes, 0.1 ms and more where the processor slept; so
it is set early by a little, and what is left of that is spent looking at the clock. Elsewhere the loop's
own timers serve: macOS waits as exactly as it is asked to; Windows does not, and there a moment may pass
by several milliseconds.
"""

import asyncio
import contextlib
import ctypes
import os
import sys
from collections.abc import Callable
from typing import Protocol

CLOCK_MONOTONIC = 1  # what an event loop's time is on Linux
TFD_TIMER_ABSTIME = 1
LEAD_S = 0.00015  # spent looking at the clock at most, at each call


class Alarm(Protocol):
    """Calls back once for each `set`; a second one before that replaces the first."""

    def set(self, when: float) -> None:
        """Call back at `when`, in seconds of the running loop's clock; at once if that has passed."""

    def close(self) -> None:
        """Never call back again."""


def new_alarm(callback: Callable[[], None]) -> Alarm:
    """The most exact alarm that this system and the running loop have."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError, NotImplementedError):
            return FileAlarm(callback)
    return LoopAlarm(callback)


class LoopAlarm:
    """An alarm of the event loop's own."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._callback = callback
        self._handle: asyncio.TimerHandle | None = None

    def set(self, when: float) -> None:
        """Call back at `when`."""
        self.close()
        self._handle = self._loop.call_at(when, self._callback)

    def close(self) -> None:
        """Never call back again."""
        if self._handle is not None:
            self._handle.cancel()


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _TimerSetting(ctypes.Structure):
    _fields_ = (("interval", _Time), ("first", _Time))


class FileAlarm:
    """A Linux timerfd, by way of ctypes: Python itself knows them from 3.13 on. Raises `OSError`."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._callback = callback
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file: int = self._libc.timerfd_create(CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._when = 0.0
        self._loop.add_reader(self._file, self._ring)

    def set(self, when: float) -> None:
        """Call back at `when`."""
        self._when = when
        seconds, fraction = divmod(max(when - LEAD_S, LEAD_S), 1)  # 0 would turn it off
        setting = _TimerSetting(first=_Time(int(seconds), int(1e9 * fraction)))
        if self._libc.timerfd_settime(self._file, TFD_TIMER_ABSTIME, ctypes.byref(setting), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")

    def close(self) -> None:
        """Never call back again."""
        if self._file >= 0:
            self._loop.remove_reader(self._file)
            os.close(self._file)
            self._file = -1

    def _ring(self) -> None:
        try:
            os.read(self._file, 8)
        except BlockingIOError:  # it was set anew in the meantime
            return
        while self._loop.time() < self._when:
            pass
        self._callback()
