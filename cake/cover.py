"""Which of the spans on offer, one after another, cover every block. Knows nothing of nodes or stages."""

from collections.abc import Iterable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Offer(NamedTuple, Generic[T]):
    """A span that somebody could run, and what it would cost to let them."""

    span: range
    cost: float
    by: T


def cheapest_cover(offers: Iterable[Offer[T]], n_blocks: int) -> list[Offer[T]] | None:
    """The offers that cover blocks 0 to `n_blocks` - 1, each once, at the least total cost.

    A span is taken whole or not at all. Of equal ones the first on offer; none if no blend of them fits.
    """
    best: list[tuple[float, list[Offer[T]]] | None] = [(0.0, []), *[None] * n_blocks]
    for offer in sorted(
        offers, key=lambda offer: offer.span.start
    ):  # all that end where it begins came before
        before = best[offer.span.start] if offer.span.stop <= n_blocks else None
        if before is None:
            continue
        cost, so_far = before[0] + offer.cost, best[offer.span.stop]
        if so_far is None or cost < so_far[0]:
            best[offer.span.stop] = (cost, [*before[1], offer])
    found = best[n_blocks]
    return found and found[1]
