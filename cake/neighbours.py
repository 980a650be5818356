"""Other Cake processes on this machine, and the CPU threads that each of them takes.

Processes that together run more threads than there are cores slow one another down tenfold: at the end
of each product the threads wait for the last one, which waits for a core. Each process therefore leaves
a note in the directory for temporary files while it runs, and reads those of the others.
"""

import atexit
import contextlib
import getpass
import os
import tempfile
from pathlib import Path


def announce_threads(threads: int, cores: int) -> str | None:
    """Leave this process's note; a warning if there are not enough cores for all, else none."""
    folder = _folder()
    if folder is None:
        return None
    others = {pid: n for pid, n in _notes(folder).items() if pid != os.getpid()}
    note = folder / str(os.getpid())
    with contextlib.suppress(OSError):
        note.write_text(str(threads))
        atexit.register(note.unlink, missing_ok=True)
    taken = sum(others.values())
    alone = not others or max(threads, *others.values()) == 1  # a single thread waits for no other
    if alone or taken + threads <= cores:
        return None
    share = max(1, cores // (len(others) + 1))
    return (
        f"{len(others)} other Cake process{'es' * (len(others) > 1)} on this machine compute"
        f"{'s' * (len(others) == 1)} with {taken} thread{'s' * (taken > 1)}, this one with {threads}, on "
        f"{cores} cores: all will be slow; give each its share, --threads {share}"
    )


def _folder() -> Path | None:
    try:
        folder = Path(tempfile.gettempdir(), f"cake-{getpass.getuser()}")
        folder.mkdir(mode=0o700, exist_ok=True)
    except (OSError, KeyError, ImportError):
        return None
    return folder


def _notes(folder: Path) -> dict[int, int]:
    """Threads by process, of those that still run; the notes of others are swept away."""
    notes = {}
    for path in folder.iterdir():
        try:
            pid, threads = int(path.name), int(path.read_text())
        except (OSError, ValueError):
            continue
        if _runs(pid):
            notes[pid] = threads
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    return notes


if os.name == "nt":

    def _runs(pid: int) -> bool:
        import psutil

        return bool(psutil.pid_exists(pid))

else:

    def _runs(pid: int) -> bool:
        try:
            os.kill(pid, 0)  # sends nothing
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True
