"""Worker processes on loopback for the scripts that measure."""

import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from cake.model.linear import Placement
from cake.topology import Topology, load_topology
from cake.weights.checkpoint import Checkpoint


@contextlib.contextmanager
def running_workers(checkpoint: Checkpoint, n: int, threads: int, placement: Placement) -> Iterator[Topology]:
    """Start worker processes that share the blocks evenly; their topology."""
    n_blocks, processes = checkpoint.config.n_blocks, []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "topology.yml")
        write_topology(file, n_blocks, [0] * n)
        common = [sys.executable, "-m", "cake", "--mode", "worker", "--model", str(checkpoint.folder)]
        common += ["--topology", str(file), "--threads", str(threads), "--cpu", "--address", "127.0.0.1:0"]
        common += ["--dtype", str(placement.dtype).removeprefix("torch."), "--quantize", placement.quantize]
        try:
            for i in range(n):
                command = [*common, "--name", f"worker{i}"]
                processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
            write_topology(file, n_blocks, [served_port(process) for process in processes])
            yield load_topology(file)
        finally:
            for process in processes:
                process.kill()
                process.wait()


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
