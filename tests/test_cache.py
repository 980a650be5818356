"""A session's KV cache: addressed by position, grown as needed, never beyond what it is allowed."""

import sys

import psutil
import pytest
import torch
from torch import Tensor

from cake.errors import SessionLostError
from cake.model.cache import FIRST_CAPACITY, SessionCache, bytes_per_token, capacity_for, longest_within
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


def new_cache() -> SessionCache:
    return SessionCache(CONFIG, 2, FIRST_CAPACITY, torch.device("cpu"), torch.float32)


def append(
    cache: SessionCache, position: int, n: int, seed: int, longest: int = 1000
) -> list[tuple[Tensor, Tensor]]:
    """What a stage does for a segment: make room, write every block, count. Each block's view."""
    generator = torch.Generator().manual_seed(seed)
    if position + n > cache.capacity:
        cache.grow(capacity_for(position + n, longest))
    cache.rewind("s", position)
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
    ("longest", "lengths", "capacities"),
    [
        (100, [1, 99], [100, 100]),
        (300, [256, 1, 43], [256, 300, 300]),
        (1000, [257, 255, 1], [512, 512, 1000]),
        (5000, [1500], [2048]),
    ],
)
def test_capacity_doubles_and_never_exceeds_the_longest(
    longest: int, lengths: list[int], capacities: list[int]
) -> None:
    totals = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    assert [capacity_for(n, longest) for n in totals] == capacities


def test_bytes_are_those_of_the_capacity() -> None:
    cache = new_cache()
    append(cache, 0, 300, seed=1)
    assert cache.capacity == 512
    assert cache.nbytes == 2 * 2 * 2 * 512 * 4 * 4  # blocks, keys and values, heads, tokens, dim, bytes
    assert cache.nbytes == 512 * bytes_per_token(CONFIG, 2, torch.float32)


@pytest.mark.parametrize("room", [1, 100, 256, 257, 512, 600, 767, 768, 1000, 1535, 1536, 5000, 100_000])
def test_the_longest_within_some_room_can_be_reached_token_by_token(room: int) -> None:
    longest = longest_within(room)
    assert room / 2 <= longest <= room
    held = 0
    for n in range(1, longest + 1):
        capacity = capacity_for(n, longest)
        assert capacity >= n
        assert capacity == held or held + capacity <= room
        held = capacity


def test_a_copy_goes_its_own_way() -> None:
    cache, other = new_cache(), new_cache()
    append(cache, 0, 10, seed=1)
    other.take_over(cache, 6)
    assert (cache.length, other.length) == (10, 6)
    views = append(other, 6, 2, seed=2)
    for block in range(2):
        for kind in range(2):
            assert torch.equal(views[block][kind][:, :6], written(10, 1, block)[kind][:, :6])
    assert torch.equal(append(cache, 10, 1, seed=3)[0][0][:, :10], written(10, 1, 0)[0])


def test_rewind_forgets_what_lies_beyond() -> None:
    cache = new_cache()
    append(cache, 0, 10, seed=1)
    views = append(cache, 4, 2, seed=2)
    assert cache.length == 6
    keys, _ = views[1]
    assert torch.equal(keys[:, :4], written(10, 1, 1)[0][:, :4])
    assert torch.equal(keys[:, 4:], written(2, 2, 1)[0])
    with pytest.raises(SessionLostError, match="first 6 tokens"):
        cache.rewind("s", 7)


def test_rewind_to_nothing() -> None:
    cache = new_cache()
    append(cache, 0, 10, seed=1)
    cache.rewind("s", 0)
    assert cache.length == 0


def test_building_on_more_than_is_held() -> None:
    cache = new_cache()
    append(cache, 0, 3, seed=1)
    with pytest.raises(SessionLostError) as raised:
        cache.rewind("mine", 4)
    assert (raised.value.session, raised.value.held) == ("mine", 3)
    assert cache.length == 3


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a system may take its time")
def test_memory_goes_back_to_the_system_at_once() -> None:
    """Also that of a cache that lies between two others, of a size that malloc would keep."""

    def held() -> int:
        resident: int = psutil.Process().memory_info().rss
        return resident

    torch.ones(16 << 18)  # malloc keeps what is smaller than it has seen freed
    caches = [new_cache() for _ in range(10)]
    for cache in caches:
        cache.grow(64 * FIRST_CAPACITY)
        cache.storage.fill_(1)
    before, n_bytes = held(), caches[0].nbytes
    del cache, caches[::2]
    assert before - held() >= 0.9 * 5 * n_bytes
