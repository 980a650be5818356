"""What no program that passes tokens around could avoid: bare blocking sockets, and memory that is read.

A ring of processes, as a master and its workers are one. Each takes a message as large as a token's, reads as
much memory as a stage has weights, and passes the message on; nothing else is done. What a round takes
beside the reading is the price of sockets, of processes that wake, and of caches that the reading has
emptied.

Run as a program it is one of the workers: `bare_ring.py NEXT_PORT MESSAGE_BYTES BYTES_TO_READ`.
"""

import contextlib
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np

SECONDS = struct.Struct("d")  # of reading, so far; the rest of a message says nothing
UNCOUNTED = 4  # rounds


def bare_overhead(n_workers: int, message_bytes: int, read_bytes: int, rounds: int = 60) -> float:
    """Median seconds per worker and round that are not reading."""
    message, losses = bytearray(message_bytes), []
    with ring(n_workers, message_bytes, read_bytes) as (first, last):
        for _ in range(rounds):
            SECONDS.pack_into(message, 0, 0.0)
            started = time.perf_counter()
            first.sendall(message)
            take(last, message)
            took = time.perf_counter() - started
            losses.append((took - SECONDS.unpack_from(message)[0]) / n_workers)
    return statistics.median(losses[UNCOUNTED:])


@contextlib.contextmanager
def ring(
    n_workers: int, message_bytes: int, read_bytes: int
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """The way to the first worker and from the last."""
    processes = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        try:
            for _ in range(n_workers):  # the last first, as each must know whom it passes on to
                command = [sys.executable, __file__, str(port), str(message_bytes), str(read_bytes)]
                process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                processes.append(process)
                assert process.stdout is not None
                port = int(process.stdout.readline())
            with connected(port) as first, listener.accept()[0] as last:
                yield first, last
        finally:
            for process in processes:
                process.kill()
                process.communicate()


def connected(port: int) -> socket.socket:
    """A connection that sends at once."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def take(connection: socket.socket, message: bytearray) -> bool:
    """Fill the message; False where the other end is gone."""
    view = memoryview(message)
    while view:
        n_bytes = connection.recv_into(view)
        if not n_bytes:
            return False
        view = view[n_bytes:]
    return True


def pass_on(next_port: int, message_bytes: int, read_bytes: int) -> None:
    """Be one of the workers, until the one before is gone."""
    weights = np.ones(max(1, read_bytes // 8))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        following, (before, _) = connected(next_port), listener.accept()
    message = bytearray(message_bytes)
    while take(before, message):
        started = time.perf_counter()
        weights.sum()
        took = time.perf_counter() - started
        SECONDS.pack_into(message, 0, SECONDS.unpack_from(message)[0] + took)
        following.sendall(message)


if __name__ == "__main__":
    pass_on(*map(int, sys.argv[1:]))
