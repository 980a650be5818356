"""The demo model on real workers: what tests of whole processes share."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from click.testing import Result
from conftest import CakeProcess

GREEDY = ("--temperature", "0", "--repeat-penalty", "1", "--dtype", "float32")
API_KEY = "not a secret"
COLOUR_SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
Start = Callable[..., CakeProcess]
Cli = Callable[..., Result]


class Cluster(NamedTuple):
    """Running workers, and the topology file under which a master finds them."""

    topology: Path
    workers: list[CakeProcess]


def until_stop(ids: list[int]) -> list[int]:
    """What is generated up to the demo model's end token, itself included."""
    return ids[: ids.index(2) + 1] if 2 in ids else ids


def answered(result: Result) -> dict:
    """What a master that runs in this process printed as JSON."""
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def start_workers(
    start: Start,
    folder: Path,
    *spans: str,
    quantize: str = "none",
    dtype: str = "float32",
    model: Path | None = None,
) -> Cluster:
    """Real workers on free ports, of the demo model unless of another."""
    path = folder / "topology.yml"

    def write(addresses: list[str]) -> None:
        nodes = {
            f"worker{i}": {"host": address, "layers": [f"model.layers.{s}" for s in span.split(", ")]}
            for i, (address, span) in enumerate(zip(addresses, spans, strict=True))
        }
        path.write_text(json.dumps(nodes))  # JSON is YAML

    write(["127.0.0.1:1"] * len(spans))
    arguments = ("--mode", "worker", "--topology", path, "--address", "127.0.0.1:0", "--dtype", dtype)
    arguments = (*arguments, "--quantize", quantize, *(("--model", model) if model else ()))
    workers = [start(*arguments, "--name", f"worker{i}") for i in range(len(spans))]
    write([worker.wait_for(r" at (127\.0\.0\.1:\d+),")[1] for worker in workers])
    return Cluster(path, workers)


def memory(status: str) -> dict[str, int]:
    """The bytes in Linux's words about a process."""
    return {name: int(n) * 1024 for name, n in re.findall(r"(\w+):\s+(\d+) kB", status)}
