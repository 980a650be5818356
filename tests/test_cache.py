"""A session's KV cache: addressed by position, grown as needed, never beyond the context."""

import pytest
import torch
from torch import Tensor

from cake.errors import SessionLostError
from cake.model.cache import FIRST_CAPACITY, SessionCache
from cake.model.config import ModelConfig, RopeConfig

CONFIG = ModelConfig(
    n_blocks=2,
    hidden_size=8,
    intermediate_size=8,
    n_heads=2,
    n_kv_heads=2,
    head_dim=4,
    vocab_size=8,
    context=4096,
    norm_eps=1e-6,
    rope=RopeConfig(10000.0),
)


def new_cache(context: int = 1000) -> SessionCache:
    return SessionCache(CONFIG, 2, context, torch.device("cpu"), torch.float32)


def append(cache: SessionCache, position: int, n: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """What a stage does for a segment: make room, write every block, count. Each block's view."""
    generator = torch.Generator().manual_seed(seed)
    cache.rewind("s", position, n)
    views = []
    for block in range(2):
        keys, values = torch.randn(2, n, 2, 4, generator=generator)
        views.append(cache.write(block, position, keys, values))
    cache.length = position + n
    return views


def written(n: int, seed: int, block: int) -> tuple[Tensor, Tensor]:
    """The keys and values that `append` wrote, `[n_kv_heads, n, head_dim]`."""
    generator = torch.Generator().manual_seed(seed)
    both = [torch.randn(2, n, 2, 4, generator=generator) for _ in range(2)][block]
    return both[0].transpose(0, 1), both[1].transpose(0, 1)


def test_write_returns_everything_up_to_there() -> None:
    cache = new_cache()
    append(cache, 0, 3, seed=1)
    views = append(cache, 3, 2, seed=2)
    for block in range(2):
        for kind in range(2):
            expected = torch.cat((written(3, 1, block)[kind], written(2, 2, block)[kind]), dim=1)
            assert torch.equal(views[block][kind], expected)


def test_contents_survive_growth() -> None:
    cache = new_cache()
    append(cache, 0, FIRST_CAPACITY, seed=1)
    assert cache.capacity == FIRST_CAPACITY
    views = append(cache, FIRST_CAPACITY, 1, seed=2)
    assert cache.capacity == 2 * FIRST_CAPACITY
    for block in range(2):
        for kind in range(2):
            assert torch.equal(views[block][kind][:, :-1], written(FIRST_CAPACITY, 1, block)[kind])
            assert torch.equal(views[block][kind][:, -1:], written(1, 2, block)[kind])


@pytest.mark.parametrize(
    ("context", "lengths", "capacities"),
    [
        (100, [1, 99], [100, 100]),
        (300, [256, 1, 43], [256, 300, 300]),
        (1000, [257, 255, 1], [512, 512, 1000]),
        (5000, [1500], [2048]),
    ],
)
def test_capacity_doubles_and_never_exceeds_the_context(
    context: int, lengths: list[int], capacities: list[int]
) -> None:
    cache, seen = new_cache(context), []
    for n in lengths:
        append(cache, cache.length, n, seed=0)
        seen.append(cache.capacity)
    assert seen == capacities
    assert cache.length == sum(lengths)
    assert cache.nbytes == 2 * 2 * 2 * cache.capacity * 4 * 4  # blocks, keys and values, heads, dim, bytes


def test_rewind_forgets_what_lies_beyond() -> None:
    cache = new_cache()
    append(cache, 0, 10, seed=1)
    views = append(cache, 4, 2, seed=2)
    assert cache.length == 6
    keys, _ = views[1]
    assert torch.equal(keys[:, :4], written(10, 1, 1)[0][:, :4])
    assert torch.equal(keys[:, 4:], written(2, 2, 1)[0])
    with pytest.raises(SessionLostError, match="first 6 tokens"):
        cache.rewind("s", 7, 1)


def test_rewind_to_nothing() -> None:
    cache = new_cache()
    append(cache, 0, 10, seed=1)
    cache.rewind("s", 0, 1)
    assert cache.length == 0


def test_building_on_more_than_is_held() -> None:
    cache = new_cache()
    append(cache, 0, 3, seed=1)
    with pytest.raises(SessionLostError) as raised:
        cache.rewind("mine", 4, 1)
    assert (raised.value.session, raised.value.held) == ("mine", 3)
    assert cache.length == 3
