"""A worker: listen, shake hands, and serve its stages to any number of masters at once.

Each connection has sessions of its own; what a master sends can end its own connection, and no
other. Torch runs in the device's thread, so the event loop always answers.
"""

import asyncio
import contextlib
import itertools
import logging
import socket
import time
from collections.abc import Sequence

from cake.memory import return_freed_memory
from cake.net.admission import Admission, Network
from cake.net.connection import Connection
from cake.net.listener import listen
from cake.tasks import end
from cake.text import human_bytes
from cake.visit import Service, Visit

log = logging.getLogger(__name__)

REPORT_EVERY_S = 5.0
QUIET_S = 1.0  # without a forward: the masters have finished, or moved


class Worker:
    """Accepts masters and serves them; `close` ends all that it began."""

    def __init__(self, service: Service, allowed: Sequence[Network] = ()) -> None:
        """Masters may come from the `allowed` networks only; from anywhere, if there are none."""
        self._service, self._admission = service, Admission(allowed)
        self._visits: dict[asyncio.Task[None], Visit] = {}
        self._of_masters: dict[str, Visit] = {}
        self._numbers = itertools.count(1)
        self._server: asyncio.Server | None = None
        self._reporter: asyncio.Task[None] | None = None
        self._left = 0  # visits that ended, and whose memory may not have been given back
        self.bytes_read = 0
        self.bytes_written = 0

    async def start(self, listener: socket.socket) -> None:
        """Begin to accept on a bound socket."""
        self._server = await listen(listener, self._accept, self._service.credentials)
        self._reporter = asyncio.create_task(self._report())

    async def drain(self, seconds: float) -> None:
        """Accept no more, and let masters finish or move what they have begun, within so many seconds."""
        assert self._server is not None, "whoever drains a worker has started it"
        self._server.close()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._quiet(), seconds)

    async def _quiet(self) -> None:
        """Tell the masters, and wait until they are gone or want nothing any more."""
        await asyncio.gather(*(visit.announce_leaving() for visit in self._of_masters.values()))
        before = -1
        while self._visits:
            begun = sum(visit.work.begun for visit in self._visits.values())
            if begun == before == sum(visit.work.ended for visit in self._visits.values()):
                return
            before = begun
            await asyncio.wait(self._visits, timeout=QUIET_S)

    async def close(self, reason: str) -> None:
        """Accept no more, and tell the masters why."""
        if self._server is not None:
            self._server.close()
        if self._reporter is not None:
            self._reporter.cancel()
        visits = dict(self._visits)
        strangers = [visit for visit in visits.values() if self._admission.waits(visit)]
        await end(visits)
        partings = [v.connection.close(None if v in strangers else reason) for v in visits.values()]
        await asyncio.gather(*partings)

    def _accept(self, connection: Connection) -> None:
        visit = Visit(self._service, connection, next(self._numbers), self._of_masters, self._admission)
        task = asyncio.create_task(self._serve(visit))
        self._visits[task] = visit
        task.add_done_callback(self._forget)  # also of one that was dropped before it began

        def drop() -> None:
            task.cancel()
            connection.abort()

        self._admission.enter(visit, connection.peer_host, drop)

    def _forget(self, task: "asyncio.Task[None]") -> None:
        visit = self._visits.pop(task)
        self._left += 1
        self._admission.leave(visit)
        self.bytes_read += visit.connection.bytes_received
        self.bytes_written += visit.connection.bytes_sent

    async def _serve(self, visit: Visit) -> None:
        try:
            await visit.run()
        except asyncio.CancelledError:
            return  # `close` says goodbye
        except Exception:  # one master's misfortune must not become the others'
            log.exception("serving %s failed", visit.connection.peer_address)
            visit.connection.abort()
        else:
            await visit.connection.close(visit.parting_words)

    def _traffic(self) -> tuple[int, int]:
        open_connections = [visit.connection for visit in self._visits.values()]
        return (
            self.bytes_read + sum(c.bytes_received for c in open_connections),
            self.bytes_written + sum(c.bytes_sent for c in open_connections),
        )

    async def _report(self) -> None:
        """Every few seconds in which there was work: operations and traffic per second."""
        stages = self._service.stages.values()
        before, moment = (0, 0, 0, 0), time.monotonic()
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            if self._left:
                self._left = 0
                return_freed_memory()
            operations = sum(stage.stats.messages for stage in stages)
            tokens = sum(stage.stats.tokens for stage in stages)
            now, after = time.monotonic(), (operations, tokens, *self._traffic())
            rates = [(b - a) / (now - moment) for a, b in zip(before, after, strict=True)]
            if operations > before[0]:
                log.info(
                    "%.1f operations/s, %.1f tokens/s, read %s/s, write %s/s",
                    *rates[:2],
                    human_bytes(rates[2]),
                    human_bytes(rates[3]),
                )
            before, moment = after, now
