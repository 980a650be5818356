#!/usr/bin/env python3
"""Make loopback behave like Wi-Fi or the internet: a TCP relay with delay, jitter, a rate, and failures.

\b
Examples:
  A worker at home, over Wi-Fi; point the topology at the address that is printed:
    python scripts/netsim.py --to 127.0.0.1:10128 --delay 3ms --jitter 2ms --rate 100mbit
  Two links with ports of their own, as over the internet:
    python scripts/netsim.py --delay 20ms --rate 50mbit \\
        --link 127.0.0.1:20001=127.0.0.1:10128 --link 127.0.0.1:20002=127.0.0.1:10129
  What the relay itself adds, and how exact its delay is:
    python scripts/netsim.py --measure

\b
Commands, a line each on stdin; N is a link's number, without it all links are meant:
  cut [N]             reset the connections and refuse new ones, until restore
  restore [N]
  freeze [N]          let nothing through, without any error, until thaw
  thaw [N]
  delay [N] 40ms      each way, from now on; so do jitter, and rate, which may be none
  status [N]

The delay is one way, so that a round trip takes it twice. Stdout has a JSON object per line: each link
at the start, and after a command the links that it was for, or what was wrong with it.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import click
from relay import Relay

from cake.topology import format_address, parse_address

SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
BITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
Address = tuple[str, int]


def duration(text: str) -> float:
    """`20ms` in seconds."""
    return quantity(text, SECONDS, "a time, such as 20ms, 0.5s or 300us")


def bit_rate(text: str) -> float | None:
    """`50mbit` in bits per second; None for `none`."""
    if text == "none":
        return None
    rate = quantity(text, BITS, "a rate, such as 50mbit, 300kbit, 1gbit or none")
    if not rate:
        raise click.BadParameter("a link with a rate of 0 is a frozen one: freeze it")
    return rate


def quantity(text: str, units: dict[str, float], wanted: str) -> float:
    """A number with one of these units behind it."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]+)", text)
    if match is None or match[2] not in units:
        raise click.BadParameter(f"{text!r} is not {wanted}")
    return float(match[1]) * units[match[2]]


def address(text: str) -> Address:
    """`host:port` in two."""
    try:
        return parse_address(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def link(text: str) -> tuple[Address, Address]:
    """`LISTEN=TO`, both of them addresses."""
    listen, separator, to = text.partition("=")
    if not separator:
        raise click.BadParameter(f"{text!r} is not a link; write 127.0.0.1:0=192.168.1.20:10128")
    return address(listen), address(to)


@click.command(help=__doc__)
@click.option("--to", type=address, metavar="HOST:PORT", help="Where a link leads.")
@click.option(
    "--listen",
    type=address,
    default="127.0.0.1:0",
    show_default=True,
    metavar="HOST:PORT",
    help="Where --to's link begins; port 0 takes a free one.",
)
@click.option("--link", "links", type=link, multiple=True, metavar="LISTEN=TO", help="One more; repeatable.")
@click.option("--delay", type=duration, default="0ms", show_default=True, help="Each way.")
@click.option("--jitter", type=duration, default="0ms", show_default=True, help="Up to so much more or less.")
@click.option("--rate", type=bit_rate, default="none", show_default=True, help="Each way and link.")
@click.option("--seed", type=int, help="Of the jitter.  [default: another one each time]")
@click.option("--measure", is_flag=True, help="Measure this relay on this machine and end.")
def main(
    to: Address | None,
    listen: Address,
    links: Sequence[tuple[Address, Address]],
    seed: int | None,
    measure: bool,
    **conditions: Any,
) -> None:
    """Relay until a signal, or measure."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if measure:
        from relay_measure import measure_relay

        return click.echo("\n".join(measure_relay()))
    pairs = [*([(listen, to)] if to else []), *links]
    if not pairs:
        raise click.UsageError("where shall it lead? Give --to HOST:PORT, or --link LISTEN=TO")
    seeds = itertools.repeat(None) if seed is None else itertools.count(seed)
    relays = [
        Relay(end, listen=start, seed=number, **conditions)
        for (start, end), number in zip(pairs, seeds, strict=False)
    ]
    return asyncio.run(serve(relays, sys.stdin))


async def serve(relays: Sequence[Relay], commands: TextIO) -> None:
    """Relay, and obey, until Ctrl-C or SIGTERM."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(ended.set) and None)
    async with contextlib.AsyncExitStack() as stack:
        for relay in relays:
            try:
                await stack.enter_async_context(relay)
            except OSError as error:
                raise click.ClickException(f"{format_address(*relay.address)}: {error}") from error
        answer("status", relays)
        if hasattr(signal, "SIGTTIN"):  # a shell's background job may not read the terminal, but shall run on
            signal.signal(signal.SIGTTIN, signal.SIG_IGN)
        # A thread, as not every system's event loop can wait for a pipe; daemonic, as nothing ends a read.
        threading.Thread(target=listen_to, args=(commands, loop, relays), daemon=True).start()
        await ended.wait()


def listen_to(commands: TextIO, loop: asyncio.AbstractEventLoop, relays: Sequence[Relay]) -> None:
    """Have the commands obeyed in the loop's thread, until there are no more."""
    # Unbuffered: a buffer's lock, held by a thread that waits, makes the end of Python a crash.
    # What is suppressed: a terminal that is not ours to read, and a loop that has ended.
    with (
        contextlib.suppress(OSError, RuntimeError),
        open(commands.fileno(), "rb", buffering=0, closefd=False) as lines,
    ):
        for line in lines:
            loop.call_soon_threadsafe(answer, line.decode(errors="replace").strip(), relays)


def answer(line: str, relays: Sequence[Relay]) -> None:
    """Obey, and say what came of it, a line for each link."""
    for part in obey(line, relays):
        click.echo(json.dumps(part))


def obey(line: str, relays: Sequence[Relay]) -> list[dict[str, object]]:
    """Do what a command says; how the links are then that it was for."""
    name, *words = line.split() or ["nothing"]
    try:
        chosen = range(len(relays))
        if words and words[0].isdecimal():
            number = int(words.pop(0))
            if number not in chosen:
                raise click.BadParameter(f"there is no link {number}, only {chosen[0]} to {chosen[-1]}")
            chosen = range(number, number + 1)
        action = parse(name, words)
        for number in chosen:
            action(relays[number])
    except (click.BadParameter, OSError) as error:
        return [{"error": str(error)}]
    return [description(number, relays[number]) for number in chosen]


SWITCHES: dict[str, Callable[[Relay], object]] = {
    "cut": Relay.cut,
    "restore": Relay.restore,
    "freeze": Relay.freeze,
    "thaw": Relay.thaw,
    "status": lambda relay: None,
}
SETTINGS: dict[str, Callable[[str], float | None]] = {"delay": duration, "jitter": duration, "rate": bit_rate}


def parse(name: str, words: Sequence[str]) -> Callable[[Relay], object]:
    """What a command does with each of its links."""
    if name in SWITCHES and not words:
        return SWITCHES[name]
    if name in SETTINGS and len(words) == 1:
        value = SETTINGS[name](words[0])
        return lambda relay: setattr(relay.conditions, name, value)
    known = [f"{switch} [N]" for switch in SWITCHES] + [f"{setting} [N] VALUE" for setting in SETTINGS]
    raise click.BadParameter(f"{' '.join([name, *words])!r} is not a command; there are {', '.join(known)}")


def description(number: int, relay: Relay) -> dict[str, object]:
    """A link for a machine to read; times in milliseconds."""
    there, back = relay.bytes
    return {
        "link": number,
        "listen": format_address(*relay.address),
        "to": format_address(*relay.to),
        "state": relay.state,
        "delay_ms": 1e3 * relay.conditions.delay,
        "jitter_ms": 1e3 * relay.conditions.jitter,
        "rate_mbit": None if relay.conditions.rate is None else relay.conditions.rate / 1e6,
        "connections": relay.connections,
        "bytes_there": there,
        "bytes_back": back,
    }


if __name__ == "__main__":
    main()
