"""Worker processes on loopback, slow links to them, and a server over them, for the scripts that measure."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click

from cake.model.linear import Placement
from cake.topology import Topology, dump_topology, load_topology
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
    checkpoint: Checkpoint,
    n: int,
    threads: int,
    placement: Placement,
    cluster_key: str | None = None,
    options: Sequence[str] = (),
) -> Iterator[tuple[Topology, list["subprocess.Popen[str]"]]]:
    """The same, with more options, and the processes in the order of their nodes."""
    n_blocks, processes = checkpoint.config.n_blocks, []
    environment = {**os.environ, **({"CAKE_CLUSTER_KEY": cluster_key} if cluster_key else {})}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "topology.yml")
        write_topology(file, n_blocks, [0] * n)
        common = [sys.executable, "-m", "cake", "--mode", "worker", "--model", str(checkpoint.folder)]
        common += ["--topology", str(file), "--threads", str(threads), "--cpu", "--address", "127.0.0.1:0"]
        common += [*as_options(placement), *options]
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
def api_process(
    checkpoint: Checkpoint, topology: Topology, placement: Placement
) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A master of one thread that answers HTTP: its URL, and its process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "topology.yml")
        file.write_text(dump_topology(topology))
        command = [sys.executable, "-m", "cake", "--model", str(checkpoint.folder), "--topology", str(file)]
        command += ["--threads", "1", "--cpu", "--api", "127.0.0.1:0", *as_options(placement)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            yield said(process, r"answering .* at (http://127\.0\.0\.1:\d+)/v1"), process
        finally:
            process.kill()
            process.wait()


def as_options(placement: Placement) -> list[str]:
    """How numbers are kept, in the words of the command line."""
    return ["--dtype", str(placement.dtype).removeprefix("torch."), "--quantize", placement.quantize]


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
    return int(said(process, r" at 127\.0\.0\.1:(\d+),"))


def said(process: "subprocess.Popen[str]", pattern: str) -> str:
    """The part of the first line to match."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if match := re.search(pattern, line):
            return match[1]
    raise click.ClickException(f"a process ended: {''.join(lines)}")


def write_topology(file: Path, n_blocks: int, ports: list[int]) -> None:
    """An even share of the blocks for each port."""
    n, text = len(ports), ""
    for i, port in enumerate(ports):
        first, last = n_blocks * i // n, n_blocks * (i + 1) // n - 1
        text += f"worker{i}: {{host: '127.0.0.1:{port}', layers: [model.layers.{first}-{last}]}}\n"
    file.write_text(text)
