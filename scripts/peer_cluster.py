"""llama.cpp over RPC workers of one thread each, in several ways, of which the best one counts.

It needs a llama-cpp-python that was built for it: `CMAKE_ARGS=-DGGML_RPC=on pip install llama-cpp-python
--no-binary llama-cpp-python`.
"""

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import click
from peer import Peer, gguf_file, started

from cake.weights.checkpoint import Checkpoint

# How the model is split, and tokens of a micro-batch: small ones overlap.
WAYS = (("layer", 512), ("layer", 64), ("tensor", 512))
LISTENING_S = 20.0


@contextlib.contextmanager
def running_llama_cpp_rpc(
    python: str, checkpoint: Checkpoint, kind: str, n_workers: int, prompt: int, generate: int
) -> Iterator[list[Peer]]:
    """One for each of the ways, each with workers of its own, which serve one master only."""
    file = gguf_file(python, checkpoint, kind, n_workers)
    with contextlib.ExitStack() as stack:
        peers = []
        for split, micro_batch in WAYS:
            addresses = [stack.enter_context(rpc_worker(python)) for _ in range(n_workers)]
            options = ("--workers", *addresses, "--split", split, "--micro-batch", micro_batch)
            job = started(python, "measure", file, 1, prompt, generate, *options)
            process, version = stack.enter_context(job)
            peers.append(Peer(process, version, f"{kind} over RPC by {split}, {micro_batch}"))
        yield peers


def best(peers: list[Peer]) -> tuple[float, float]:
    """The best of the ways for the prompt, and the best for the generation."""
    prompts, generations = zip(*(peer.medians() for peer in peers), strict=True)
    return max(prompts), max(generations)


@contextlib.contextmanager
def rpc_worker(python: str) -> Iterator[str]:
    """A worker that listens; its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    command = [python, str(Path(__file__).with_name("peer_process.py")), "serve", address]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_it_listens(port, process)
        yield address
    finally:
        process.kill()
        process.wait()


def wait_until_it_listens(port: int, process: "subprocess.Popen[bytes]") -> None:
    """Raises `ClickException` where it ends instead, or takes too long."""
    deadline = time.monotonic() + LISTENING_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        time.sleep(0.1)
    raise click.ClickException("llama.cpp's RPC worker does not listen; was llama-cpp-python built with it?")
