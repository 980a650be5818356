"""Who proposes, and how many: n-grams over literal texts, and the pace on a clock that the test winds."""

import random
from collections.abc import Callable

import pytest

from cake.model.sampling import Sampler, SamplingParams
from cake.speculation import LONGEST_REST, MOST_PASSES, NOTICED_S, NGrams, Pace, Speculation

SAMPLER = Sampler(SamplingParams())


def ids_of(text: str) -> list[int]:
    return [ord(letter) for letter in text]


async def guess(text: str, most: int = 4) -> str:
    ngrams = NGrams()
    await ngrams.begin(ids_of(text))
    return "".join(map(chr, await ngrams.propose(ids_of(text), 0, most, SAMPLER)))


@pytest.mark.parametrize(
    ("text", "proposed"),
    [
        ("", ""),
        ("a", ""),
        ("aba", ""),  # one letter is too little to go by
        ("abcdef", ""),
        ("abcd..ab", "cd.."),
        ("abXY..abZW..ab", "ZW.."),  # the latest time counts
        ("1abcdX 2cdY 3abcd", "X 2c"),  # but a longer match counts more
        ("0bcdX 2cdY 3abcd", "X 2c"),
        ("ababab", "abab"),  # what repeats goes on repeating
        ("xyxy", "xyxy"),
        ("aaaa", "aaaa"),
        ("xyz xyz xyz", " xyz"),
    ],
)
async def test_ngrams_propose_what_followed_before(text: str, proposed: str) -> None:
    assert await guess(text) == proposed
    assert await guess(text, 1) == proposed[:1]


async def test_ngrams_follow_a_text_that_grows_as_if_they_read_it_anew() -> None:
    generator = random.Random(1)
    ids = [generator.randrange(3) for _ in range(10)]
    grown = NGrams()
    await grown.begin(ids)
    for _ in range(60):
        ids += [generator.randrange(3) for _ in range(generator.randrange(1, 4))]
        fresh = NGrams()
        await fresh.begin(ids)
        assert await grown.propose(ids, 0, 6, SAMPLER) == await fresh.propose(ids, 0, 6, SAMPLER)


async def test_ngrams_read_each_token_once() -> None:
    class Counted(list[int]):
        reads = 0

        def __getitem__(self, key):
            self.reads += 1
            return super().__getitem__(key)

    ids, ngrams = Counted(range(1000)), NGrams()
    await ngrams.begin(ids)
    ids.reads = 0
    for token in range(100):
        ids.append(token)
        await ngrams.propose(ids, 0, 15, SAMPLER)
    assert ids.reads < 100 * 10


async def test_ngrams_learn_nothing_from_what_is_only_assumed() -> None:
    ngrams = NGrams()
    await ngrams.begin(ids_of("abcdXab"))
    assert await ngrams.propose(ids_of("abcdXab"), 0, 2, SAMPLER) == ids_of("cd")
    assert await ngrams.propose(ids_of("abcdXabcd"), 2, 3, SAMPLER) == ids_of("Xab")
    assert await ngrams.propose(ids_of("abcdXabZab"), 0, 2, SAMPLER) == ids_of("Za")


async def test_ngrams_begin_anew_with_each_answer() -> None:
    ngrams = NGrams()
    await ngrams.begin(ids_of("abcdabcd"))
    await ngrams.begin(ids_of("xyab"))
    assert await ngrams.propose(ids_of("xyab"), 0, 4, SAMPLER) == []


def flat(n: int) -> float:
    """A slow network: a row more costs next to nothing."""
    return 1 + 0.01 * n


def steep(n: int) -> float:
    """A slow processor: three rows take twice the time of one."""
    return 1 + 0.35 * n


Cost = Callable[[int], float]


def drive(pace: Pace, cost: Cost, share: float, rounds: int = 300, seed: int = 0) -> tuple[float, float]:
    """Tokens per unit of time, and proposals per round, where this share of them is right."""
    chance, seconds, tokens, proposed = random.Random(seed), 0.0, 0, 0
    for _ in range(rounds):
        n = pace.best()
        right = 0
        while right < n and chance.random() < share:
            right += 1
        duration = cost(n) * chance.uniform(0.9, 1.1)
        pace.learn(n, right, duration)
        seconds, tokens, proposed = seconds + duration, tokens + right + 1, proposed + n
    return tokens / seconds, proposed / rounds


def best_of(cost: Cost, share: float) -> float:
    """What the best constant number would bring."""
    return max(sum(share**i for i in range(n + 1)) / cost(n) for n in range(16))


@pytest.mark.parametrize("share", [0, 0.2, 0.5, 0.8, 0.95, 1])
@pytest.mark.parametrize("cost", [flat, steep])
def test_the_pace_is_nearly_the_best_there_is(cost: Cost, share: float) -> None:
    for seed in range(3):
        speed, _ = drive(Pace(15), cost, share, seed=seed)
        assert speed > 0.85 * best_of(cost, share)
        assert speed > 0.96, "as fast as without, whatever is proposed"


def test_long_proposals_over_a_slow_network_and_none_where_they_do_not_pay() -> None:
    assert drive(Pace(15), flat, 0.95)[1] > 10
    assert drive(Pace(15), steep, 0.1)[1] < 0.3
    assert 1 < drive(Pace(15), steep, 0.8)[1] < 6


def test_right_proposals_that_take_as_long_as_they_save_are_left_alone() -> None:
    speed, proposed = drive(Pace(15), lambda n: 1 + 1.1 * n, 1)
    assert speed > 0.96
    assert proposed < 0.1


def test_the_pace_knows_its_limit_and_grows_towards_it() -> None:
    pace, chosen = Pace(9), []
    for _ in range(8):
        chosen.append(pace.best())
        pace.learn(chosen[-1], chosen[-1], flat(chosen[-1]))
    assert chosen == [0, 0, 1, 3, 7, 9, 9, 9]


def test_a_text_that_begins_to_repeat_is_noticed_and_one_that_ends_to_as_well() -> None:
    pace = Pace(15)
    drive(pace, steep, 0)
    assert drive(pace, steep, 0, 100)[1] < 0.1
    drive(pace, steep, 1, 2 * LONGEST_REST)
    assert drive(pace, steep, 1, 20)[1] > 3
    drive(pace, steep, 0, 20)
    assert drive(pace, steep, 0, 100)[1] < 0.2


def test_a_network_that_becomes_slow_is_noticed() -> None:
    pace = Pace(15)
    assert drive(pace, steep, 0.7)[1] < 4
    assert drive(pace, lambda n: 20 + steep(n), 0.7)[1] > 4


def test_one_hiccup_changes_little() -> None:
    pace = Pace(15)
    drive(pace, flat, 0.9)
    before = pace.best()
    pace.learn(before, before, 1000.0)
    assert pace.best() >= before // 2


def test_passes_go_together_where_they_are_long_on_the_network_and_probably_right() -> None:
    pace = Pace(15)
    assert pace.passes(0, 1.0) == 1
    drive(pace, flat, 1, 30)
    assert pace.passes(15, 0) == pace.passes(15, NOTICED_S / 2) == 1, "one machine, loopback"
    assert [pace.passes(15, share * flat(15)) for share in (0.3, 0.6, 0.8)] == [2, 3, 5]
    assert pace.passes(15, 1.0) == pace.passes(15, 2.0) == MOST_PASSES
    assert pace.passes(0, 1.0) == 1, "what does not pay does not pay twice"
    drive(pace, flat, 0.8, 30)
    assert pace.passes(1, 0.8 * flat(1)) > pace.passes(15, 0.8 * flat(15)) == 1
    drive(pace, flat, 0.1, 30)
    assert pace.passes(3, 0.8 * flat(3)) == 1


def test_the_time_of_a_pass_that_waited_for_another_is_a_price_only_until_there_is_a_better_one() -> None:
    alone, queued = Pace(15), Pace(15)
    for pace in (alone, queued):
        drive(pace, flat, 1, 30)
        for _ in range(30):
            pace.learn(15, 15, 3 * flat(15), alone=pace is alone)
    assert alone.best() < queued.best() == 15
    fresh = Pace(15)
    drive(fresh, flat, 1, 4)
    fresh.learn(9, 9, flat(9), alone=False)
    assert fresh.best() > 9, "it is known to be tried"


async def test_who_has_no_room_is_not_asked() -> None:
    class Silent(NGrams):
        async def propose(self, ids, assumed, most, sampler):
            raise AssertionError

    assert await Speculation(Silent(), 15, lambda: 0.0).propose([1], 0, 0, SAMPLER) == []


async def test_proposals_that_take_longer_than_they_save_are_left_alone() -> None:
    speculation, asked = Speculation(NGrams(), 15, lambda: 0.0), []
    for _ in range(100):
        asked.append(speculation.best())
        speculation.learn(asked[-1], asked[-1], 1.0 + 2.0 * asked[-1], True)
    assert sum(asked) < 60
