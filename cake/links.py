"""A visit's links: connections of this worker to others, over which results go on to the next stage.

Knows numbers and connections, and nothing of stages.
"""

import asyncio
import functools
from collections.abc import Callable, Coroutine

from cake.errors import CakeError, NodeError, ProtocolError
from cake.net.connection import MAX_REASON, Connection, connect
from cake.net.keyed import KeyedConnection, new_connection
from cake.net.tls import Credentials
from cake.protocol.handshake import hello
from cake.protocol.messages import Failed, Goodbye, Link, Linked, Message, Unlinked, Welcome

LINK_S = 5.0
MAX_LINKS = 64


class Links:
    """Those of one master, by the numbers that it gave them."""

    def __init__(
        self,
        credentials: Credentials | None,
        dead_after: float,
        say: Callable[[Message], Coroutine[None, None, None]],
    ) -> None:
        """`say` tells the master of a link that is over."""
        self._credentials, self._dead_after, self._say = credentials, dead_after, say
        self._standing: dict[int, Connection] = {}
        self._known: set[int] = set()  # those that ever stood
        self._tasks: set[asyncio.Task[None]] = set()

    def standing(self, number: int) -> Connection | None:
        """The connection, unless it broke."""
        return self._standing.get(number)

    def known(self, number: int) -> bool:
        """Whether there is such a link, or was."""
        return number in self._known

    def close(self) -> None:
        """Drop all, and tell nobody."""
        standing, self._standing = self._standing, {}
        for link in standing.values():
            link.abort()

    async def open(self, message: Link) -> Message:
        """Connect to another worker; the answer to the master."""
        try:
            if self.known(message.id):
                raise ProtocolError(f"there is a link {message.id} already")
            if len(self._standing) == MAX_LINKS:
                raise NodeError(f"there are {MAX_LINKS} links already")
            link = await asyncio.wait_for(connect_peer(message, self._credentials), LINK_S)
        except asyncio.TimeoutError:
            return Failed(message.id, f"no answer within {LINK_S:g} s")
        except (OSError, OverflowError, ValueError, CakeError) as error:
            return Failed(message.id, getattr(error, "strerror", None) or str(error))
        self._standing[message.id] = link
        self._known.add(message.id)
        link.keep_alive(self._dead_after)
        # It has nothing to say but that it is alive, or goodbye.
        link.hand_over(lambda _: link.abort(), lambda error: self._ended(message.id, error))
        return Linked(message.id)

    def _ended(self, number: int, error: Exception) -> None:
        """A link is over: tell the master, for what was on its way there is lost."""
        link = self._standing.pop(number, None)
        if link is not None:
            link.abort()
            task = asyncio.create_task(self._say(Unlinked(number, str(error)[:MAX_REASON])))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


async def connect_peer(message: Link, credentials: Credentials | None) -> Connection:
    """A connection to another worker, after its welcome."""
    new = functools.partial(new_connection, credentials=credentials)
    connection = await connect(message.host, message.port, new)
    try:
        if isinstance(connection, KeyedConnection):
            await connection.prove_as_master(message.node)
        await connection.send(hello(message.node, message.visit))
        answer = (await connection.receive()).message
        if not isinstance(answer, Welcome) or answer.node != message.node:
            raise NodeError(f"it refused: {answer.reason if isinstance(answer, Goodbye) else 'another node'}")
    except BaseException:
        connection.abort()
        raise
    return connection
