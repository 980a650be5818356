"""A client's connection: given up where it takes too long to ask, or to take its answer.

Of connections there are only so many. When more come, the one that has kept the server waiting longest
gives way; where all have asked and wait for their answers, who comes is told to come back.
Knows nothing of what is asked.
"""

import asyncio
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from cake.api.errors import ApiError
from cake.api.gate import refusing

MOST_CONNECTIONS = 512
ASK_S = 60.0  # for a request with its body, from the connection's beginning or the end of the answer before
KEEP_ALIVE_S = 15  # in which nothing of a further request comes
TAKE_S = 30.0  # in which a client takes at least
LEAST_TAKEN = 1 << 14  # bytes, where so many wait for it
SEND_BUFFER = 1 << 16  # bytes that the system keeps for it; beyond them the answer waits

TOO_MANY = ApiError(
    503,
    f"there are {MOST_CONNECTIONS} connections, as many as there may be",
    "overloaded",
    "server_error",
    closes=True,
)


class ClientConnection(H11Protocol):
    """HTTP/1.1 with a client that may be slow, or mean no good."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.awaited_since: float | None = None  # on the event loop's clock; None while an answer is made
        self._asking: asyncio.TimerHandle | None = None
        self._taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Somebody is there."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # the application waits while anything waits for the client
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if len(self.connections) > MOST_CONNECTIONS and not self._another_gives_way():
            self.app = refusing(self.app, TOO_MANY)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over, whoever ended it."""
        for timer in (self._asking, self._taking):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """More of a request."""
        super().data_received(data)
        self._await_request()

    def on_response_complete(self) -> None:
        """What was asked is answered; the next request may come."""
        super().on_response_complete()
        self._await_request()

    def pause_writing(self) -> None:
        """The system takes no more for the client now."""
        super().pause_writing()
        self._await_taking()

    def resume_writing(self) -> None:
        """All is taken."""
        super().resume_writing()
        if self._taking is not None:
            self._taking.cancel()

    def _await_request(self) -> None:
        """Let the time for a request run exactly while it is not complete."""
        incomplete = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if incomplete and self._asking is None:
            self.awaited_since = self.loop.time()
            self._asking = self.loop.call_later(ASK_S, self.transport.abort)
        elif not incomplete and self._asking is not None:
            self._asking.cancel()
            self.awaited_since = self._asking = None

    def _await_taking(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._taking = self.loop.call_later(TAKE_S, self._judge_taking, waiting)

    def _judge_taking(self, before: int) -> None:
        """Nothing was added meanwhile."""
        if before - self.transport.get_write_buffer_size() < LEAST_TAKEN:
            self.transport.abort()
        else:
            self._await_taking()

    def _another_gives_way(self) -> bool:
        waiting = [
            (each.awaited_since, each)
            for each in self.connections
            if isinstance(each, ClientConnection) and each is not self and each.awaited_since is not None
        ]
        if not waiting:
            return False
        _, longest = min(waiting, key=lambda pair: pair[0])
        self.connections.discard(longest)  # which is gone in a moment
        longest.transport.abort()
        return True
