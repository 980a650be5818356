"""What the relay adds on this machine, and how exact its delay and its rate are.

`netsim.py --measure` calls this. The relay runs in a process of its own, as the command does; round trips
go to one more process and back, the time of one way is taken with both sockets in this process.
"""

import contextlib
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cake.text import columns
from cake.topology import parse_address

N = 500
SIZES = (64, 8 * 1024, 64 * 1024)
DELAY_MS, RATE_MBIT, RATE_BYTES = 20, 50, 2_000_000

ECHO = """
import socket
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
while True:
    peer, _ = server.accept()
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while data := peer.recv(65536):
        peer.sendall(data)
"""


def measure_relay() -> list[str]:
    """A table of round trips, and a line each about delay and rate."""
    rows = [["round trip, median / p95", "bare loopback", "through the relay", "added"]]
    with running("-c", ECHO) as line, relayed(int(line)) as address:
        for n_bytes in SIZES:
            bare, ours = (round_trips(each, n_bytes) for each in (("127.0.0.1", int(line)), address))
            added = 1e6 * (statistics.median(ours) - statistics.median(bare))
            rows.append([f"{n_bytes} bytes", microseconds(bare), microseconds(ours), f"{added:.0f} µs"])
    with one_way(f"--delay={DELAY_MS}ms") as (sender, receiver):
        delays = [time_of_bytes(sender, receiver, bytes(64)) for _ in range(N // 2)]
    middle, worst = (1e3 * quantile(delays, p) for p in (0.5, 0.99))
    with one_way(f"--rate={RATE_MBIT}mbit") as (sender, receiver):
        rate = 8e-6 * RATE_BYTES / time_of_bytes(sender, receiver, bytes(RATE_BYTES))
    return [
        *columns(rows),
        f"one way of {DELAY_MS} ms: least {1e3 * min(delays):.2f}, p50 {middle:.2f}, p99 {worst:.2f} ms",
        f"rate of {RATE_MBIT} Mbit/s: {rate:.2f} Mbit/s",
    ]


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[str]:
    """A Python process, and the first line that it prints."""
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline()
        finally:
            process.kill()


@contextlib.contextmanager
def relayed(port: int, *options: str) -> Iterator[tuple[str, int]]:
    """A relay to a port of loopback; its address."""
    command = str(Path(__file__).with_name("netsim.py"))
    with running(command, "--to", f"127.0.0.1:{port}", *options) as line:
        yield parse_address(json.loads(line)["listen"])


@contextlib.contextmanager
def one_way(*options: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two sockets, and a relay from the first to the second."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        relayed(server.getsockname()[1], *options) as address,
        connected(address) as sender,
        server.accept()[0] as receiver,
    ):
        yield sender, receiver


def connected(address: tuple[str, int]) -> socket.socket:
    """A socket that sends at once."""
    peer = socket.create_connection(address)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return peer


def round_trips(address: tuple[str, int], n_bytes: int) -> list[float]:
    """Seconds there and back; the first tenth is not counted."""
    with connected(address) as peer:
        return [time_of_bytes(peer, peer, bytes(n_bytes)) for _ in range(N)][N // 10 :]


def time_of_bytes(sender: socket.socket, receiver: socket.socket, data: bytes) -> float:
    """Seconds until `data` has arrived."""
    started = time.perf_counter()
    sending = threading.Thread(target=sender.sendall, args=(data,))  # much of it would fill all buffers
    if len(data) > max(SIZES):
        sending.start()
    else:
        sender.sendall(data)
    missing = len(data)
    while missing:
        missing -= len(receiver.recv(missing))
    return time.perf_counter() - started


def microseconds(seconds: Sequence[float]) -> str:
    """Median and 95th percentile."""
    return f"{1e6 * statistics.median(seconds):.0f} / {1e6 * quantile(seconds, 0.95):.0f} µs"


def quantile(values: Sequence[float], p: float) -> float:
    """The value that a share of `p` does not exceed."""
    return sorted(values)[int(p * (len(values) - 1))]
