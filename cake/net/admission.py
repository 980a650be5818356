"""Who may come in: from which addresses, how many at once, and how soon after they failed.

Decides before anybody has proven anything, so that strangers cannot keep a master out. Knows neither
sockets nor keys: a visitor is anything that can be told from another.
"""

import asyncio
import ipaddress
import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from cake.errors import CakeError, ProtocolError

log = logging.getLogger(__name__)

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_PENDING = 64
MAX_FAILURES = 3
MAX_LINES = 20
FORGIVEN_AFTER_S = 60.0
PAUSES_S = (1.0, 2.0, 4.0)  # below the time that a handshake may take
MAX_REMEMBERED = 1024  # addresses that failed


def parse_networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Of `192.168.1.0/24` or `fd00::1`, also several with commas between. Raises `CakeError`."""
    names = [name.strip() for text in texts for name in text.split(",")]
    try:
        return tuple(ipaddress.ip_network(name, strict=False) for name in names)
    except ValueError as error:
        raise CakeError(f"--allow: {error}; write 192.168.1.0/24, or 192.168.1.20") from error


def parse_host(host: str) -> Address | None:
    """A peer's address; one of IPv4 that a socket for IPv6 has dressed up is undressed."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:  # a socket that is closed already does not know whose it was
        return None
    return getattr(address, "ipv4_mapped", None) or address


def household(host: str) -> str:
    """What counts as one address: of IPv6 a whole /64, as everybody at home has one to choose from."""
    address = parse_host(host)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


class _Waiting(NamedTuple):
    household: str
    drop: Callable[[], None]


_Queue: TypeAlias = dict[Hashable, _Waiting]  # in the order of arrival


class Admission:
    """A worker's door: who may come, and who of those that wait must go when too many do.

    Half of the places are for those who are in the middle of a handshake, so that no crowd of others
    drives them out, and half for the others, so that nobody who stops in the middle keeps them out. In
    each half, who must go is of the address with most the one who has waited longest.
    """

    def __init__(self, allowed: Iterable[Network] = ()) -> None:
        """With `allowed`, nobody else may come; without, everybody may."""
        self._allowed = tuple(allowed)
        self._silent: _Queue = {}
        self._begun: _Queue = {}
        self._crowded = False
        self.refused = Failures()  # for whatever reason: further refusals come later
        self.guessed = Failures()  # wrong proofs: further ones are judged later, the right ones too

    def allows(self, host: str) -> bool:
        """Whether masters may come from there."""
        address = parse_host(host)
        return not self._allowed or any(address in network for network in self._allowed if address)

    def waits(self, visitor: Hashable) -> bool:
        """Whether this one has come and has neither been let in nor gone."""
        return visitor in self._silent or visitor in self._begun

    def enter(self, visitor: Hashable, host: str, drop: Callable[[], None]) -> None:
        """Somebody has come; `drop` makes them go."""
        self._add(self._silent, visitor, _Waiting(household(host), drop))

    def begins(self, visitor: Hashable) -> None:
        """What they have said so far is the beginning of a handshake."""
        if visitor in self._silent:  # and was not dropped in this moment
            self._add(self._begun, visitor, self._silent.pop(visitor))

    def fails(self, visitor: Hashable) -> None:
        """They will not be let in, and only wait for the answer."""
        if visitor in self._begun:
            self._add(self._silent, visitor, self._begun.pop(visitor))

    def leave(self, visitor: Hashable) -> None:
        """They have been let in, or have gone."""
        self._silent.pop(visitor, None)
        self._begun.pop(visitor, None)
        self._crowded = self._crowded and bool(self._silent or self._begun)

    def _add(self, queue: _Queue, visitor: Hashable, waiting: _Waiting) -> None:
        if len(queue) == MAX_PENDING // 2:
            if not self._crowded:  # one line, however many come
                self._crowded = True
                log.warning("too many connections without a handshake; the oldest give way")
            crowd = Counter(each.household for each in queue.values())
            most = max(crowd.values())
            oldest = next(who for who, each in queue.items() if crowd[each.household] == most)
            queue.pop(oldest).drop()
        queue[visitor] = waiting


@dataclass
class _Failed:
    """What is remembered of an address."""

    number: int = 0
    forgiven_at: float = 0.0
    turn: float = 0.0  # when the last was judged, or will be


class Failures:
    """Who failed lately: after three times an address is made to wait."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._of: dict[str, _Failed] = {}  # who failed last, last

    def add(self, host: str) -> None:
        """Once more."""
        where = household(host)
        failed = self._lately(host) or _Failed()
        failed.number += 1
        failed.forgiven_at = self._clock() + FORGIVEN_AFTER_S
        self._of.pop(where, None)
        self._of[where] = failed
        if len(self._of) > MAX_REMEMBERED:
            del self._of[next(iter(self._of))]

    def pause(self, host: str) -> float:
        """Seconds that somebody from there waits, and between two who come at once."""
        failed = self._lately(host)
        if failed is None or failed.number < MAX_FAILURES:
            return 0.0
        return PAUSES_S[min(failed.number - MAX_FAILURES, len(PAUSES_S) - 1)]

    def worth_a_line(self, host: str) -> bool:
        """Whether the log should tell of the last one from there: crowds must not fill the disk."""
        failed = self._lately(host)
        if failed is not None and failed.number == MAX_LINES:
            log.warning("%s was refused %d times; what follows from there is not logged", host, MAX_LINES)
        return failed is None or failed.number < MAX_LINES

    async def turn(self, host: str) -> None:
        """Wait that long: one after the other, however many come at once.

        Raises `ProtocolError` where too many wait already.
        """
        failed, pause, now = self._lately(host), self.pause(host), self._clock()
        if failed is None or not pause:
            return
        turn = max(now, failed.turn) + pause
        if turn > now + PAUSES_S[-1]:
            raise ProtocolError("others at its address failed to prove the cluster key, and it must wait")
        failed.turn = turn
        await asyncio.sleep(turn - now)

    def _lately(self, host: str) -> _Failed | None:
        failed = self._of.get(household(host))
        return failed if failed is not None and self._clock() < failed.forgiven_at else None
