"""What is asked of the system for every socket that carries messages. Knows nothing of messages."""

import socket


def _options() -> list[tuple[int, int, int]]:
    """No waiting for more to send; a peer that has vanished is noticed within half a minute.

    What a system does not know by these names stays as it is there.
    """
    options = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    timing = {
        "TCP_KEEPIDLE": 10,  # seconds of silence before the first probe
        "TCP_KEEPALIVE": 10,  # the same on macOS
        "TCP_KEEPINTVL": 5,
        "TCP_KEEPCNT": 4,
        "TCP_USER_TIMEOUT": 30_000,  # milliseconds that sent bytes may stay unacknowledged
    }
    known = [(getattr(socket, name), value) for name, value in timing.items() if hasattr(socket, name)]
    return options + [(socket.IPPROTO_TCP, option, value) for option, value in known]


_OPTIONS = _options()


def set_options(connected: socket.socket) -> None:
    """Ask it of this one."""
    for level, option, value in _OPTIONS:
        connected.setsockopt(level, option, value)
