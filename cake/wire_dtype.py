"""The dtype in which hidden states travel to a worker and back.

The person's choice; else that of the activations, but int8 for parts of prompts where the link and not
the worker would set the pace. Knows times and sizes only; neither tensors nor sockets.
"""

import logging
from collections import deque
from dataclasses import dataclass

log = logging.getLogger(__name__)

LONG_TOKENS = 17  # from here on it is part of a prompt: more tokens than a session generates at a time
MEASURED_BYTES = 64 * 1024  # there and back; the time of less says little about the rate
NOTICED_S = 0.02  # shorter transfers are left alone: a busy machine's hiccup takes as long


@dataclass(frozen=True)
class Trip:
    """A forward there and back, its times in seconds."""

    longest: int  # tokens of its longest segment
    n_bytes: int  # of both messages
    waited_s: float
    compute_s: float


class WireDtype:
    """Of one worker's stage: chosen for each message, from the trips of those before."""

    def __init__(self, worker: str, chosen: str | None, round_trip_s: float) -> None:
        """`round_trip_s` is what an empty message takes, at most."""
        self._worker, self._chosen = worker, chosen
        self._round_trip_s = round_trip_s
        # A lost packet, TCP's slow start or a hiccup only make a link look slower: the best one counts.
        self._rates: deque[float] = deque(maxlen=4)  # bytes per second
        self._compute_s_per_byte = 0.0  # of hidden states one way in the activations' dtype
        self._told = False

    def choose(self, longest: int, n_bytes: int, dtype: str) -> str:
        """For hidden states that take `n_bytes` one way in `dtype`, that of the activations."""
        if self._chosen is not None:
            return self._chosen
        if longest < LONG_TOKENS or not self._rates:
            return dtype
        rate = max(self._rates)
        transfer_s, compute_s = n_bytes / rate, n_bytes * self._compute_s_per_byte
        if transfer_s < max(compute_s, NOTICED_S):
            return dtype
        if not self._told:
            self._told = True
            log.info(
                "the link to worker %r (%.0f Mbit/s) is slower than the worker: prompts go to it in int8 "
                "from now on (--wire-dtype %s keeps them exact)",
                *(self._worker, rate * 8e-6, dtype),
            )
        return "int8"

    def observe(self, trip: Trip, n_bytes: int, alone: bool) -> None:
        """Learn from a trip; `n_bytes` as in `choose`.

        Of one that was not `alone` at its start, waiting for others would count as transfer.
        """
        if trip.longest >= LONG_TOKENS:
            self._compute_s_per_byte = trip.compute_s / n_bytes
        if not alone:
            return
        network_s = trip.waited_s - trip.compute_s
        if trip.n_bytes < MEASURED_BYTES:
            self._round_trip_s = min(self._round_trip_s, network_s)
        elif trip.longest >= LONG_TOKENS:
            self._rates.append(trip.n_bytes / max(network_s - self._round_trip_s, 1e-6))
