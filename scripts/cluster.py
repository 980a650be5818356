"""Worker processes on loopback, and slow links to them, for the scripts that measure."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click

from cake.model.linear import Placement
from cake.topology import Topology, load_topology
from cake.weights.checkpoint import Checkpoint


@contextlib.contextmanager
def running_workers(
    checkpoint: Checkpoint, n: int, threads: int, placement: Placement, cluster_key: str | None = None
) -> Iterator[Topology]:
    """Start worker processes that share the blocks evenly; their topology."""
    with worker_processes(checkpoint, n, threads, placement, cluster_key) as (topology, _):
        yield topology


@contextlib.contextmanager
def worker_processes(
    checkpoint: Checkpoint, n: int, threads: int, placement: Placement, cluster_key: str | None = None
) -> Iterator[tuple[Topology, list["subprocess.Popen[str]"]]]:
    """The same, and the processes in the order of their nodes."""
    n_blocks, processes = checkpoint.config.n_blocks, []
    environment = {**os.environ, **({"CAKE_CLUSTER_KEY": cluster_key} if cluster_key else {})}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "topology.yml")
        write_topology(file, n_blocks, [0] * n)
        common = [sys.executable, "-m", "cake", "--mode", "worker", "--model", str(checkpoint.folder)]
        common += ["--topology", str(file), "--threads", str(threads), "--cpu", "--address", "127.0.0.1:0"]
        common += ["--dtype", str(placement.dtype).removeprefix("torch."), "--quantize", placement.quantize]
        try:
            for i in range(n):
                command = [*common, "--name", f"worker{i}"]
                process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
                processes.append(process)
            write_topology(file, n_blocks, [served_port(process) for process in processes])
            yield load_topology(file), processes
        finally:
            for process in processes:
                process.kill()
                process.wait()


@contextlib.contextmanager
def relayed(workers: Topology, rate: str, delay: str) -> Iterator[Topology]:
    """The same workers, each behind a slow link: `rate` and `delay` as scripts/netsim.py takes them."""
    command = [sys.executable, str(Path(__file__).with_name("netsim.py")), "--rate", rate, "--delay", delay]
    for node in workers.nodes.values():
        command += ["--link", f"127.0.0.1:0={node.address}"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            links = [json.loads(process.stdout.readline())["listen"] for _ in workers.nodes]
            ports = [int(listen.rpartition(":")[2]) for listen in links]
            nodes = zip(workers.nodes.items(), ports, strict=True)
            yield Topology({name: replace(node, host="127.0.0.1", port=port) for (name, node), port in nodes})
        finally:
            process.kill()


def served_port(process: "subprocess.Popen[str]") -> int:
    """The port that a worker says it serves at."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if match := re.search(r" at 127\.0\.0\.1:(\d+),", line):
            return int(match[1])
    raise click.ClickException(f"a worker ended: {''.join(said)}")


def write_topology(file: Path, n_blocks: int, ports: list[int]) -> None:
    """An even share of the blocks for each port."""
    n, text = len(ports), ""
    for i, port in enumerate(ports):
        first, last = n_blocks * i // n, n_blocks * (i + 1) // n - 1
        text += f"worker{i}: {{host: '127.0.0.1:{port}', layers: [model.layers.{first}-{last}]}}\n"
    file.write_text(text)
