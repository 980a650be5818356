#!/usr/bin/env python3
"""Check everything: ruff, mypy, pytest. Arguments go to pytest.

python3 scripts/test.py [-k name ...]
"""

import os
import subprocess
import sys

from environment import ROOT, ensure

CHECKS = (
    ["ruff", "check", "."],
    ["ruff", "format", "--check", "."],
    ["mypy"],
)


# A process for each core, as most tests wait for others' processes; but each holds a torch of its own.
IN_PARALLEL = ["-n", "logical", "--maxprocesses", "4", "--dist", "loadgroup"]


def main() -> int:
    """Run all checks, even after one failed; 0 if all passed."""
    python = str(ensure("dev"))
    commands = [*CHECKS, ["pytest", *IN_PARALLEL, *sys.argv[1:]]]
    failed = []
    for command in commands:
        print("$", *command, flush=True)
        # Tests start several processes; one thread each keeps them from spinning against each other.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if subprocess.run([python, "-m", *command], cwd=ROOT, env=env, check=False).returncode:
            failed.append(command[0])
    if failed:
        print("failed:", *failed, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
