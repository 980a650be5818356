"""What every command has in common: how it fails, what its options mean, where its output goes.

Knows no command.
"""

import contextlib
import functools
import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cake.errors import CakeError
from cake.terminal import LogHandler, tell_interrupt
from cake.text import parse_bytes

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def errors_in_one_line(command: Callable[..., None]) -> Callable[..., None]:
    """What a person can mend ends in one line and exit code 2; `--debug` shows the traceback."""

    @functools.wraps(command)
    def run(debug: bool, **options: Any) -> None:
        try:
            command(debug=debug, **options)
        except CakeError as error:
            if debug:
                logging.getLogger(__name__).exception("the whole story")
            click.echo(f"Error: {error}", err=True)
            sys.exit(EXIT_BAD_INPUT)
        except KeyboardInterrupt:
            tell_interrupt()
            sys.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:  # whoever read our output has had enough of it
            _drop_stdout()
        except OSError as error:
            _drop_stdout()
            click.echo(f"Error: {error}", err=True)
            sys.exit(EXIT_BAD_INPUT)

    return run


def _drop_stdout() -> None:
    """What is still buffered can go nowhere; at exit Python would complain of it."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class FiniteRange(click.FloatRange):
    """A range that knows that nan is in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; fails for nan and the infinities too."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def read_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """A size with its unit, in bytes."""
    try:
        return None if value is None else parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}.", ctx, param) from error


def set_up_output(debug: bool, level: int) -> None:
    """Log to stderr from `level` on, write UTF-8 wherever the output goes, and miss no stream."""
    logging.basicConfig(
        handlers=[LogHandler()],
        level=logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    logging.getLogger("cake").setLevel(logging.DEBUG if debug else level)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8")  # a pipe on Windows would choke on most scripts


DEBUG = click.option("--debug", is_flag=True, help="Show tracebacks and the debug log.")
SETTINGS = {"max_content_width": 100, "help_option_names": ["-h", "--help"]}
POSITIVE = click.IntRange(min=1)
