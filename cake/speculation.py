"""Several tokens per trip: who proposes a session's next tokens, and how many are worth a pass.

A pass that verifies k proposals brings up to k + 1 tokens for one trip through the stages. Which of them
stay is the sampler's business (`cake.model.sampling`); here nothing is known of logits, and of the
pipeline only how long its passes take, and how much of that on the network.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from cake.model.sampling import Sampler

LONGEST, SHORTEST = 4, 2  # n-grams: shorter ones match everywhere and foretell little
PLAIN_ROUNDS = 2  # at first, to know what proposals have to compete with
MEMORY = 0.8  # weight of what was accepted before against the latest round's
NEWEST = 0.25  # weight of the latest time against those before
LONGEST_REST = 32  # rounds without proposals, before another trial of one
MOST_PASSES = 8  # on their way at once
NOTICED_S = 0.005  # shorter ways through the network are left alone: a busy machine's loopback takes as long


class Proposer(Protocol):
    """Who guesses how a session goes on."""

    async def begin(self, ids: Sequence[int]) -> None:
        """Take in the beginning of an answer: its prompt, and its first token."""

    async def propose(self, ids: Sequence[int], assumed: int, most: int, sampler: Sampler) -> list[int]:
        """At most `most` tokens after `ids`, as `sampler` may choose them.

        The last `assumed` of the `ids` were all proposed, in this order, and may still turn out wrong; the
        others have only grown since `begin`.
        """

    async def forget(self) -> None:
        """Free what is held for the session."""


class NGrams:
    """Proposes what followed when the session's last tokens stood in its text before."""

    def __init__(self) -> None:
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> where its latest continuation begins
        self._indexed = 0  # tokens that are known as continuations

    async def begin(self, ids: Sequence[int]) -> None:
        """Index a text from its beginning."""
        self._next.clear()
        self._indexed = 0
        self._index(ids, len(ids))

    async def propose(self, ids: Sequence[int], assumed: int, most: int, sampler: Sampler) -> list[int]:
        """The continuation of the longest n-gram that stood before, as of the last time it did."""
        self._index(ids, len(ids) - assumed)
        found = (self._next.get(tuple(ids[-n:])) for n in range(LONGEST, SHORTEST - 1, -1))
        start = next((place for place in found if place is not None), None)
        if start is None:
            return []
        proposals = list(ids[start : start + most])
        while len(proposals) < most:  # what repeats to its very end goes on repeating
            proposals.append(proposals[len(proposals) - (len(ids) - start)])
        return proposals

    async def forget(self) -> None:
        """Forget the text."""
        self._next.clear()
        self._indexed = 0

    def _index(self, ids: Sequence[int], end: int) -> None:
        """Note the new tokens before `end`, each as the continuation of those before it."""
        for place in range(max(self._indexed, SHORTEST), end):
            for n in range(SHORTEST, min(LONGEST, place) + 1):
                self._next[tuple(ids[place - n : place])] = place
        self._indexed = end


class Pace:
    """How many tokens to propose: as many as bring the most tokens per second.

    Expects of k proposals `1 + a + a² + ... + aᵏ` tokens, where `a` is the share of them that was right
    lately (Leviathan et al., arXiv:2211.17192, equation 1), in the time that rounds with k took lately,
    the making of the proposals included. Over a slow network that time hardly depends on k; on a
    processor that computes with every row anew, it grows. Where no number pays, one proposal is tried
    now and then, the more rarely the more often that was in vain.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._right, self._tried = 1.0, 2.0
        self._seconds: dict[int, float] = {}  # of a round, by its number of proposals
        self._plain = 0  # rounds without
        self._pause = self._rest = 1

    def best(self) -> int:
        """How many the next round should propose."""
        if self._plain < PLAIN_ROUNDS:
            return 0
        # Not much longer than what was tried, so that a mistake costs little.
        longest = min(self._most, 2 * max(self._seconds) + 1)
        best = max(range(longest + 1), key=lambda n: self._expected(n) / self._estimate(n))
        return best or int(self._rest <= 0)

    def passes(self, n: int, network_s: float) -> int:
        """How many passes with `n` proposals each should be on their way, if one is so long on the network.

        One that follows others saves that time where they turn out as assumed, and elsewhere it costs the
        stages what they compute: it is worth it where the odds are better than computing's share of a
        pass. And no more go at once than one processor that computed for all stages could keep up with.
        """
        if n == 0 or network_s < NOTICED_S:
            return 1
        computing = max(1 - network_s / self._estimate(n), 1 / MOST_PASSES)
        chance = self._share ** (n + 1)
        most = math.ceil(1 / computing)
        return next((i for i in range(1, most) if chance**i < computing), most)

    def learn(self, proposed: int, accepted: int, seconds: float, alone: bool = True) -> None:
        """What became of a round. One that was not `alone` may have waited for those before it."""
        if proposed == 0:
            self._plain += 1
            self._rest -= 1
        else:
            # What was thought to be wrong was right: look again soon. Where proposals are known to be right
            # and yet do not pay, a trial teaches nothing.
            surprised = accepted > 0 and self._right < self._tried / 2
            self._right = MEMORY * self._right + accepted
            self._tried = MEMORY * self._tried + accepted + (accepted < proposed)
            self._pause = 1 if surprised else min(2 * self._pause, LONGEST_REST)
            self._rest = self._pause
        if proposed not in self._seconds:
            self._seconds[proposed] = seconds
        if not alone:
            return
        known = self._seconds[proposed]
        # A hiccup is not a price: one long round counts as one twice as long as usual.
        self._seconds[proposed] += NEWEST * (min(seconds, 2 * known) - known)

    @property
    def _share(self) -> float:
        """Of the proposals, those that were right lately."""
        return self._right / self._tried

    def _expected(self, n: int) -> float:
        """Tokens that a round with `n` proposals brings."""
        return sum(self._share**i for i in range(n + 1))

    def _estimate(self, n: int) -> float:
        """Seconds of a round with `n` proposals: on the line through its neighbours among those known."""
        known = sorted(self._seconds)
        above = next((i for i, m in enumerate(known) if m >= n), len(known) - 1)
        if above == 0:
            return self._seconds[known[0]]
        low, high = known[above - 1], known[above]
        rise = (self._seconds[high] - self._seconds[low]) / (high - low)
        return self._seconds[low] + max(rise, 0.0) * (n - low)


class Speculation:
    """One session's proposals: how many, in how many passes, from whom, and what became of them."""

    def __init__(self, proposer: Proposer, most: int, network_s: Callable[[], float]) -> None:
        """At most `most` a pass, which spends `network_s()` of its time on the network."""
        self._proposer, self._pace, self._network_s = proposer, Pace(most), network_s

    async def begin(self, ids: Sequence[int]) -> None:
        """An answer begins."""
        await self._proposer.begin(ids)

    def best(self) -> int:
        """How many tokens the next pass should propose."""
        return self._pace.best()

    def passes(self, n: int) -> int:
        """How many passes with `n` proposals each should be on their way."""
        return self._pace.passes(n, self._network_s())

    async def propose(self, ids: Sequence[int], assumed: int, most: int, sampler: Sampler) -> list[int]:
        """At most `most` tokens that may come after `ids`, of which the last are only `assumed`."""
        return await self._proposer.propose(ids, assumed, most, sampler) if most > 0 else []

    def learn(self, proposed: int, accepted: int, seconds: float, alone: bool) -> None:
        """What became of a pass, from the making of its proposals to its end; `alone` if it followed none."""
        self._pace.learn(proposed, accepted, seconds, alone)

    async def forget(self) -> None:
        """The session is over."""
        await self._proposer.forget()
