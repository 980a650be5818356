"""Which spans, one after another, cover every block."""

import pytest

from cake.cover import Offer, cheapest_cover

COVERS = {
    "one after another": ([(0, 3, 0), (3, 6, 0)], [0, 1]),
    "in any order": ([(3, 6, 0), (0, 3, 0)], [1, 0]),
    "the cheaper one": ([(0, 3, 1), (0, 3, 0.5), (3, 6, 0)], [1, 2]),
    "of equals the first": ([(0, 6, 1), (0, 6, 1)], [0]),
    "a long one for two": ([(0, 3, 1), (3, 6, 1), (0, 6, 1)], [2]),
    "two for a long one": ([(0, 3, 1), (3, 6, 1), (0, 6, 3)], [0, 1]),
    "a gap": ([(0, 3, 0), (4, 6, 0)], None),
    "an overlap is no way": ([(0, 4, 0), (3, 6, 0)], None),
    "beyond the last block": ([(0, 7, 0)], None),
    "nothing": ([], None),
}


@pytest.mark.parametrize(("offers", "chosen"), COVERS.values(), ids=COVERS)
def test_the_cheapest_cover(offers: list[tuple[int, int, float]], chosen: list[int] | None) -> None:
    made = [Offer(range(first, stop), cost, i) for i, (first, stop, cost) in enumerate(offers)]
    cover = cheapest_cover(made, 6)
    assert (cover and [offer.by for offer in cover]) == chosen
