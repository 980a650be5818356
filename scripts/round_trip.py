"""How long one decode step's hidden state takes there and back, to a worker that does no compute.

`bench.py` calls this; run by itself it is that worker.
"""

import asyncio
import contextlib
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from cake.chain import Chain
from cake.dialling import Patience, connect_worker
from cake.model.batch import Batch, Segment
from cake.net.connection import connect
from cake.net.listener import bind
from cake.protocol.handshake import Expectation, hello
from cake.protocol.messages import Forward, WireSegment, WireTensor
from cake.protocol.tensors import to_wire
from cake.remote import RemoteStage
from cake.stage import Answered
from cake.stage_stats import StageStats
from cake.topology import Node
from cake.visit import Service
from cake.worker import Worker

HIDDEN_SIZE = 4096


class EchoStage:
    """A stage that gives back what it gets."""

    node, blocks, device, dtype, weights = "echo", range(1), "none", "bfloat16", "none"

    def __init__(self) -> None:
        self.stats = StageStats()

    def is_quick(self, n_tokens: int) -> bool:
        """Always."""
        return True

    def answer_at_once(self, hidden: WireTensor, segments: object, arrived_s: float) -> Answered:
        """The same hidden states."""
        return Answered(hidden, 0.0, arrived_s, 0.0)

    async def answer(self, hidden: WireTensor, segments: object, arrived_s: float) -> Answered:
        """The same."""
        return self.answer_at_once(hidden, segments, arrived_s)

    async def forget(self, sessions: object) -> None:
        """Nothing is held."""


async def serve_echo() -> None:
    """Be the echo worker until killed; prints the port."""
    listener = bind("127.0.0.1", 0)
    service = Service("echo", "echo", HIDDEN_SIZE, 1 << 20, {0: EchoStage()}, [""])
    await Worker(service).start(listener)
    print(listener.getsockname()[1], flush=True)
    await asyncio.Event().wait()


@contextlib.contextmanager
def echo_worker() -> Iterator[int]:
    """An echo worker in a process of its own; its port."""
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


async def measure_round_trips(port: int, n: int) -> dict[str, dict[str, float]]:
    """Microseconds there and back, three ways: bare bytes, frames, and as the pipeline does it.

    `bytes` sends as many bytes through two plain sockets: what this machine's loopback takes. `frames`
    goes from handing the message to the connection until the answer is a message again; `stage`
    includes the tensor's way to bytes and back.
    """
    node = Node("echo", "127.0.0.1", port, (range(1),))
    expected = Expectation("echo", "echo", HIDDEN_SIZE, (range(1),), (None,))
    worker = await connect_worker(node, expected, Patience())
    stage, hidden = Chain([RemoteStage(worker, range(1))]), torch.zeros(1, HIDDEN_SIZE, dtype=torch.bfloat16)
    stage_times = []
    for position in range(n):
        started = time.perf_counter()
        await stage.forward(Batch(hidden, (Segment(0, position, 1),)))
        stage_times.append(time.perf_counter() - started)
    await worker.close()
    connection = await connect(node.host, node.port)
    await connection.send(hello("echo"))
    await connection.receive()
    connection.raise_limits(1 << 20)
    frame_times = []
    for position in range(n):
        message = Forward(position, 0, (WireSegment(0, position, 1, 0),), (), (), to_wire(hidden))
        started = time.perf_counter()
        await connection.send(message)
        await connection.receive()
        frame_times.append(time.perf_counter() - started)
    await connection.close()
    times = {"bytes": bare_round_trips(hidden.nbytes, n), "frames": frame_times, "stage": stage_times}
    return {name: in_microseconds(each[n // 10 :]) for name, each in times.items()}


def bare_round_trips(n_bytes: int, n: int) -> list[float]:
    """Seconds for bytes to another process and back over loopback, with blocking sockets."""
    command = [sys.executable, "-c", BARE_ECHO.format(n_bytes=n_bytes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        with socket.create_connection(("127.0.0.1", int(process.stdout.readline()))) as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            data = bytes(n_bytes)
            return [one_round_trip(peer, data) for _ in range(n)]


def one_round_trip(peer: socket.socket, data: bytes) -> float:
    """Seconds until `data` is back."""
    started = time.perf_counter()
    peer.sendall(data)
    peer.recv(len(data), socket.MSG_WAITALL)
    return time.perf_counter() - started


BARE_ECHO = """
import socket
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
peer, _ = server.accept()
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while data := peer.recv({n_bytes}, socket.MSG_WAITALL):
    peer.sendall(data)
"""


def in_microseconds(seconds: list[float]) -> dict[str, float]:
    """Median, least and most."""
    summary = {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    return {name: round(1e6 * value, 1) for name, value in summary.items()}


if __name__ == "__main__":
    asyncio.run(serve_echo())
