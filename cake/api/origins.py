"""Which pages may ask, and by which names a server may be asked: a browser asks what any page tells it to.

It says which page that is, by its origin. Pages of other origins than the server's own may not ask, unless
somebody said so. But a stranger's name can lead to this server too (DNS rebinding), and a page under that
name would be of its own origin: so a server without a key answers only to names that no stranger can have.
Knows nothing of HTTP.
"""

import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from cake.errors import CakeError

ANY = "*"
PORTS = {"http": 80, "https": 443}
# RFC 6762, RFC 8375 and ICANN keep the first three from being sold, nobody sells the next two, and the last
# is its router's maker's.
PRIVATE = (".local", ".home.arpa", ".internal", ".lan", ".home", ".fritz.box")

Names = Literal[
    "any", "network", "machine"
]  # who may have them: anyone; who is in this network; this machine


@dataclass(frozen=True)
class Origins:
    """Whom a server answers."""

    allowed: frozenset[str] = frozenset()  # as `read_origins` gives them, beside its own
    names: Names = "any"

    def allow(self, origin: str) -> bool:
        """Whether somebody said that pages of that origin may ask."""
        return ANY in self.allowed or origin in self.allowed

    def may_ask(self, origin: str, host: str) -> bool:
        """Whether pages of that origin may ask the server, which they call `host`."""
        return self.allow(origin) or origin.partition("://")[2] == host

    def answer_to(self, host: str) -> bool:
        """Whether the server may be called `host`, with a port or without."""
        if self.names == "any" or ANY in self.allowed:
            return True
        name = _name(host)
        if not name:
            return False
        if name in {_name(_host(each)) for each in self.allowed} or _is_of_machine(name):
            return True
        return self.names == "network" and _is_of_network(name)


def read_origins(given: Iterable[str]) -> frozenset[str]:
    """Origins as browsers write them; `*` is any, `null` that of files. Raises `CakeError` for others."""
    return frozenset(each if each in (ANY, "null") else _origin(each) for each in given)


def _origin(given: str) -> str:
    url = given.lower().removesuffix("/")
    scheme, _, host = url.partition("://")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        host = ""
    if not host or not parts.hostname or parts.netloc != host or "@" in host:
        raise CakeError(f"--api-origin {given}: write such as https://chat.example.org, or * for any")
    return url.removesuffix(f":{port}") if port == PORTS.get(scheme) else url


def _is_of_machine(name: str) -> bool:
    """Whether it means this machine wherever it is said."""
    address = _address(name)
    return address.is_loopback if address else name == "localhost" or name.endswith(".localhost")


def _is_of_network(name: str) -> bool:
    """Whether no stranger can have it: an address, this machine's own name, or one known only here."""
    return (
        bool(_address(name))
        or "." not in name
        or name.endswith(PRIVATE)
        or name == socket.gethostname().lower()
    )


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _host(origin: str) -> str:
    return origin.partition("://")[2]


def _name(host: str) -> str:
    """Without port and brackets."""
    try:
        return (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:
        return ""
