#!/usr/bin/env python3
"""See Cake work: two workers and a master on this machine, with a small model.

    python3 scripts/demo.py ["your prompt"]

Sets up .venv on the first run. What it starts is printed, so that you can type it yourself.
"""

import os
import shlex
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from environment import ensure

PROMPT = "Explain in two sentences why the sky is blue."
BLOCKS = 30


def main() -> int:
    """Run the demo; the master's exit code."""
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    python = ensure("demo")
    prompt = " ".join(sys.argv[1:]) or PROMPT
    threads = str(max(1, cores() // 3))  # three processes share the machine
    with tempfile.TemporaryDirectory() as folder:
        topology = Path(folder, "topology.yml")
        addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
        topology.write_text(topology_text(addresses))
        common = [python, "-m", "cake", "--topology", topology, "--threads", threads]
        # Converts the demo model if need be, before three processes want it at once.
        if code := subprocess.run([str(python), "-c", PREPARE], check=False).returncode:
            return code
        processes, logs = [], Path(folder, "workers.log")
        try:
            for number, address in enumerate(addresses):
                role = ("--mode", "worker", "--name", f"worker{number}", "--address", address)
                with logs.open("ab") as log:  # beside the answer, their lines would only confuse
                    processes.append(start(*common, *role, stderr=log))
            processes.append(start(*common, "--prompt", prompt, "--sample-len", "120"))
            code = processes[-1].wait()
            if code:
                print(f"what the workers said:\n{logs.read_text()}", file=sys.stderr)
            return code
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()


PREPARE = "from cake.weights.demo_model import demo_model_folder as f; f(lambda name: True)"


def start(*command: object, stderr: "IO[bytes] | None" = None) -> "subprocess.Popen[bytes]":
    """Start a command after showing it."""
    words = [str(word) for word in command]
    print("$", shlex.join(words), file=sys.stderr, flush=True)
    return subprocess.Popen(words, stderr=stderr)


def topology_text(addresses: "list[str]") -> str:
    """Each worker gets half of the blocks."""
    half = BLOCKS // 2
    spans = [f"0-{half - 1}", f"{half}-{BLOCKS - 1}"]
    return "".join(
        f"worker{i}:\n  host: {address}\n  layers: [model.layers.{span}]\n"
        for i, (address, span) in enumerate(zip(addresses, spans))  # noqa: B905 - any Python says its version
    )


def free_ports(n: int) -> "list[int]":
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
