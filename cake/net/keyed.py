"""A connection whose ends prove the cluster key, inside TLS 1.3, before they say anything else.

What is proven, and in which bytes, stands in `cake.protocol.cluster_key`. Whoever fails hears nothing
of why: a wrong key, a replayed proof and a relay that swaps certificates end alike.
"""

import secrets
from collections.abc import Awaitable, Callable

from cake.errors import ClusterKeyError, ProtocolError
from cake.net.connection import MAX_REASON, Connection, ConnectionLostError
from cake.net.tls import Credentials, Tls
from cake.protocol.cluster_key import (
    BOTH_NEED_IT,
    DIGEST_BYTES,
    HEAD,
    MAX_UNPROVEN,
    NONCE_BYTES,
    OPENING_BYTES,
    Handshake,
    Preface,
    digest,
    is_preface,
    read_head,
)
from cake.protocol.messages import Buffer, Goodbye, Message
from cake.protocol.states import Role

WANTS_A_KEY = f"this worker wants a cluster key; {BOTH_NEED_IT}"


class KeyedConnection(Connection):
    """Carries messages once the proof is done; until then bytes, and few of them."""

    def __init__(
        self, role: Role, credentials: Credentials, on_open: Callable[[Connection], None] | None = None
    ) -> None:
        super().__init__(role, on_open)
        self._credentials = credentials
        self._unread = bytearray()
        self._framed = False
        self._tls: Tls | None = None

    async def prove_as_master(self, called: str) -> None:
        """To the node `called`. Raises `ClusterKeyError` with the reason, or what `receive` does."""
        own, nonce = self._credentials, secrets.token_bytes(NONCE_BYTES)
        self.write(Preface(nonce, own.certificate).encode())
        if not is_preface(await self._peek(OPENING_BYTES)):
            await self._hear_the_reason()
        worker = await self._read_preface()
        try:
            seen = await self._start_tls(worker.certificate, server=False)
        except ProtocolError as error:
            raise ClusterKeyError(f"is not to be reached in private: {error}; who sits between?") from error
        handshake = Handshake(nonce, worker.nonce, own.certificate, seen, digest(called.encode()))
        self.write(handshake.called + handshake.proof(own.key, "master"))
        try:
            answer = await self._read(DIGEST_BYTES)
        except ConnectionLostError as error:
            raise ClusterKeyError(f"refuses this cluster key; {BOTH_NEED_IT}") from error
        if not handshake.proves(own.key, "worker", answer):
            raise ClusterKeyError(f"does not know the cluster key, or another sits between; {BOTH_NEED_IT}")
        self._start_frames()

    async def hear_preface(self) -> Preface:
        """The master's. Raises what `receive` does; a plain hello is as wrong as noise."""
        if not is_preface(await self._peek(OPENING_BYTES)):
            raise ProtocolError(WANTS_A_KEY)
        return await self._read_preface()

    async def prove_as_worker(self, master: Preface, turn: Callable[[], Awaitable[None]]) -> None:
        """Let the master prove itself first; waits for its `turn` before it judges.

        Raises `ClusterKeyError` where the proof is wrong, or what `receive` does.
        """
        own, nonce = self._credentials, secrets.token_bytes(NONCE_BYTES)
        self.write(Preface(nonce, own.certificate).encode())
        seen = await self._start_tls(master.certificate, server=True)
        called, proof = await self._read(DIGEST_BYTES), await self._read(DIGEST_BYTES)
        await turn()
        handshake = Handshake(master.nonce, nonce, seen, own.certificate, called)
        if not handshake.proves(own.key, "master", proof):
            raise ClusterKeyError("its cluster key is another, or another sits between")
        self.write(handshake.proof(own.key, "worker"))
        self._start_frames()

    async def send(self, message: Message) -> int:
        """As any connection does; but to a peer that was to prove itself and did not, nothing."""
        if self._tls is not None and not self._framed:
            raise ProtocolError("the cluster key is not proven")
        return await super().send(message)

    def write(self, data: Buffer) -> None:
        """Send bytes, encrypted once TLS stands."""
        for piece in self._tls.encrypt(data) if self._tls is not None else (data,):
            super().write(piece)

    def _take(self, data: memoryview) -> None:
        if not self._framed and self.bytes_received > MAX_UNPROVEN:
            raise ProtocolError(f"more than {MAX_UNPROVEN} bytes before the cluster key was proven")
        try:
            for piece in self._tls.decrypt(data) if self._tls is not None else (data,):
                if self._framed:
                    super()._take(piece)
                else:
                    self._unread += piece
        finally:
            self._flush()

    def _flush(self) -> None:
        """Send what TLS itself has to say, an alert for example."""
        if self._tls is not None and self._tls.outgoing.pending:
            super().write(self._tls.outgoing.read())

    async def _peek(self, n_bytes: int) -> bytes:
        while len(self._unread) < n_bytes:
            await self._something()
        return bytes(self._unread[:n_bytes])

    async def _read(self, n_bytes: int) -> bytes:
        data = await self._peek(n_bytes)
        del self._unread[:n_bytes]
        return data

    async def _read_preface(self) -> Preface:
        nonce, length = read_head(await self._read(HEAD.size))
        return Preface(nonce, await self._read(length))

    async def _start_tls(self, certificate: bytes, server: bool) -> bytes:
        """Everything from now on is encrypted; returns the peer's certificate once it has been proven."""
        if self._unread:
            raise ProtocolError("the peer went on before its time")
        self._tls = Tls(self._credentials.context(certificate, server), server)
        self._flush()
        while not self._tls.established:
            await self._something()
        return self._tls.peer_certificate

    def _start_frames(self) -> None:
        """What comes now is messages."""
        self._framed = True
        super()._take(memoryview(self._unread))

    async def _hear_the_reason(self) -> None:
        """A worker that answers a preface with a frame says in it why it will not go on."""
        self._start_frames()
        message = (await self.receive()).message
        assert isinstance(message, Goodbye)  # the table of states allows no other
        reason = "".join(c if c.isprintable() else "?" for c in message.reason[:MAX_REASON])
        raise ClusterKeyError(f"refused: {reason}")  # whoever said it, the terminal obeys no stranger


def new_connection(
    role: Role, credentials: Credentials | None, on_open: Callable[[Connection], None] | None = None
) -> Connection:
    """Keyed with credentials, plain without."""
    return KeyedConnection(role, credentials, on_open) if credentials else Connection(role, on_open)
