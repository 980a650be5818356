"""Continuous batching, over a pipeline of which the test decides when a batch comes through."""

import asyncio
from collections.abc import Hashable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from cake.chunks import CHUNK_BESIDE_OTHERS, FEW_TOKENS, SMALLEST_CHUNK, chunk_tokens
from cake.errors import CakeError, NodeLostError, SessionLostError
from cake.groups import Groups
from cake.model.batch import Segment
from cake.scheduler import Scheduler
from cake.session import Session


class Gate:
    """Stages that hold each batch until it is let through; a token's hidden state is its id."""

    max_batch_tokens = 2048

    def __init__(self, n_stages: int) -> None:
        self.n_stages = n_stages
        self.waiting: list[tuple[list[Segment], asyncio.Future[None]]] = []
        self.seen: list[list[tuple[int, int]]] = []  # (position, length) of each batch's segments
        self.until: list[dict[Hashable, int]] = []  # blocks before which sessions of a batch end
        self.replaced: list[int] = []  # blocks behind the stages that were lost, told one by one
        self.mended = asyncio.Event()

    async def forward(
        self, ids: Sequence[int], segments: Sequence[Segment], until: Mapping[Hashable, int]
    ) -> Tensor:
        self.seen.append([(s.position, s.length) for s in segments])
        self.until.append(dict(until))
        through: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append((list(segments), through))
        await through
        return torch.tensor(ids, dtype=torch.float32)[:, None]

    def lacking(self, session: Hashable) -> int | None:
        return self.replaced.pop(0) if self.replaced else None

    async def mend(self) -> None:
        await self.mended.wait()

    async def choose(self, hidden: Tensor, choice):
        return choice(hidden)

    async def let(self, error: Exception | None = None) -> list[Segment]:
        """The first batch comes through, or fails."""
        await settle()
        segments, through = self.waiting.pop(0)
        through.set_exception(error) if error else through.set_result(None)
        await settle()
        return segments


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


def last(logits: Tensor) -> int:
    return int(logits[-1])


async def generate(scheduler: Scheduler, session: Session, n: int) -> list[int]:
    """Each next token is the last one plus one."""
    for _ in range(n):
        session.ids.append(await scheduler.run(session, last) + 1)
    return session.ids


def lengths(gate: Gate) -> list[int]:
    return [sum(length for _, length in batch) for batch in gate.seen]


@pytest.mark.parametrize(
    ("n_tokens", "n_stages", "chunk"),
    [(5000, 1, 512), (1024, 2, 48), (2000, 2, 64), (10, 4, SMALLEST_CHUNK), (10**6, 2, 512)],
)
def test_chunks_fit_the_stages(n_tokens: int, n_stages: int, chunk: int) -> None:
    assert chunk_tokens(n_tokens, n_stages) == chunk


async def test_sessions_that_generate_travel_in_as_many_groups_as_there_are_stages() -> None:
    gate = Gate(2)
    scheduler = Scheduler(gate)
    tasks = [asyncio.create_task(generate(scheduler, Session([10 * i]), 6)) for i in range(8)]
    for _ in range(12):
        assert len(gate.waiting) <= 2
        await gate.let()
    assert lengths(gate)[:12] == [4] * 12, "neither a clump nor crumbs"
    assert [task.result() for task in tasks] == [list(range(10 * i, 10 * i + 7)) for i in range(8)]


class Fixed(Groups):
    """As many groups as a test says."""

    def __init__(self, wanted: int) -> None:
        super().__init__()
        self.wanted = wanted

    def number(self, n_stages: int) -> int:
        return self.wanted


async def test_groups_become_fewer_and_more() -> None:
    gate, groups = Gate(2), Fixed(2)
    scheduler = Scheduler(gate, groups=groups)
    tasks = [asyncio.create_task(generate(scheduler, Session([10 * i]), 9)) for i in range(8)]
    for n_groups, n_batches, share in ((2, 4, 4), (1, 3, 8), (2, 6, 4)):
        groups.wanted, before = n_groups, len(gate.seen)
        while len(gate.seen) - before < n_batches:
            await gate.let()
            assert len(gate.waiting) <= 2
        assert lengths(gate)[-n_batches:] == [share] * n_batches
    while gate.waiting:
        await gate.let()
    assert [task.result() for task in tasks] == [list(range(10 * i, 10 * i + 10)) for i in range(8)]


async def test_one_group_goes_without_those_who_have_left() -> None:
    gate = Gate(2)
    scheduler = Scheduler(gate, groups=Fixed(1))
    tasks = [asyncio.create_task(generate(scheduler, Session([10 * i]), i + 1)) for i in range(3)]
    for _ in range(3):
        await gate.let()
    assert lengths(gate) == [3, 2, 1]
    assert all(task.done() for task in tasks)


async def test_a_prompt_is_in_every_stage_though_the_others_are_one_group() -> None:
    gate = Gate(2)
    scheduler = Scheduler(gate, groups=Fixed(1))
    talkers = [asyncio.create_task(generate(scheduler, Session([10 * i]), 30)) for i in range(4)]
    await settle()
    prompt = asyncio.create_task(scheduler.run(Session(list(range(1000))), last))
    for _ in range(8):
        await gate.let()
        assert prompt.done() or len(gate.waiting) == 2
    for task in (*talkers, prompt):
        task.cancel()


async def test_chunks_of_a_prompt_follow_one_another_without_waiting() -> None:
    gate = Gate(2)
    done = asyncio.create_task(Scheduler(gate, chunk=100).run(Session(list(range(450))), last))
    await settle()
    assert gate.seen == [[(i, 100)] for i in (0, 100, 200, 300)], "one in each stage, two ahead"
    for _ in range(5):
        assert not done.done()
        await gate.let()
    assert done.result() == 449


async def test_one_stage_gets_one_batch_at_a_time() -> None:
    gate = Gate(1)
    done = asyncio.create_task(Scheduler(gate, chunk=100).run(Session(list(range(150))), last))
    await settle()
    assert gate.seen == [[(0, 100)]]
    await gate.let()
    await gate.let()
    assert done.result() == 149


async def test_tokens_of_others_ride_along_with_small_chunks_of_a_prompt() -> None:
    gate = Gate(1)
    scheduler = Scheduler(gate)
    talker = asyncio.create_task(generate(scheduler, Session([1]), 5))
    await settle()
    prompt = asyncio.create_task(scheduler.run(Session(list(range(1000))), last))
    await settle()
    for _ in range(4):
        await gate.let()
    assert gate.seen[0] == [(0, 1)]
    assert gate.seen[1:5] == [
        [(i, 1), (CHUNK_BESIDE_OTHERS * (i - 1), CHUNK_BESIDE_OTHERS)] for i in range(1, 5)
    ]
    await gate.let()
    assert talker.result() == [1, 2, 3, 4, 5, 6]
    assert lengths(gate)[5] == 512, "nobody generates any more"
    while not prompt.done():
        await gate.let()
    assert prompt.result() == 999


async def test_prompts_are_served_in_order_of_arrival() -> None:
    gate = Gate(1)
    scheduler = Scheduler(gate, chunk=64)
    finished: list[int] = []

    async def ask(number: int) -> None:
        await scheduler.run(Session(list(range(100))), last)
        finished.append(number)

    tasks = [asyncio.create_task(ask(i)) for i in range(64)]
    while len(finished) < 64:
        await gate.let()
    assert finished == list(range(64))
    assert set(lengths(gate)) == {64}, "a chunk that a prompt does not fill is filled by the next"
    await asyncio.gather(*tasks)


async def test_the_last_rows_that_are_wanted_come_in_one_part() -> None:
    gate = Gate(1)
    scheduler = Scheduler(gate, chunk=64)
    done = asyncio.create_task(scheduler.run(Session(list(range(126))), torch.flatten, [126, 127, 128, 129]))
    for _ in range(3):
        await gate.let()
    assert gate.seen == [[(0, 64)], [(64, 61)], [(125, 5)]]
    assert done.result().tolist() == [125, 126, 127, 128, 129]


async def test_a_lost_session_is_sent_again_and_the_others_of_its_batch_go_on() -> None:
    gate = Gate(1)
    scheduler = Scheduler(gate)
    lost, other = Session(list(range(FEW_TOKENS + 4))), Session([7, 8])
    lost.held = FEW_TOKENS
    told: list[int] = []
    first = asyncio.create_task(scheduler.run(lost, last, on_progress=told.append))
    second = asyncio.create_task(scheduler.run(other, last))
    await gate.let(SessionLostError(lost.number, 3))
    again = [*await gate.let(), *await gate.let()]
    assert {s.session: (s.position, s.length) for s in again} == {
        lost.number: (0, FEW_TOKENS + 4),
        other.number: (0, 2),
    }
    assert (first.result(), second.result()) == (FEW_TOKENS + 3, 8)
    assert lost.held == FEW_TOKENS + 4
    assert told == [], "a replay is no progress"


async def test_stages_behind_a_lost_one_do_not_get_the_tokens_again() -> None:
    gate = Gate(1)
    scheduler, session, told = Scheduler(gate, chunk=64), Session(list(range(101)), held=100), list[int]()
    gate.replaced = [3]
    job = scheduler.start(session, last, on_progress=told.append)
    await gate.let(SessionLostError(session.number, 0))
    for _ in range(3):
        await gate.let()
    assert gate.seen[1:] == [[(0, 64)], [(64, 36)], [(100, 1)]], "no part is for all stages and for some"
    assert gate.until[1:] == [{session.number: 3}, {session.number: 3}, {}]
    assert (job.done.result(), session.held, session.kept) == (100, 101, None)
    assert told == [1], "a replay is no progress"


async def test_a_short_replay_goes_in_parts_too() -> None:
    gate = Gate(2)
    scheduler, session = Scheduler(gate), Session([1, 2, 3, 4], held=3)
    gate.replaced = [3]
    job = scheduler.start(session, last, [5, 6])
    await gate.let(SessionLostError(session.number, 0))
    assert gate.seen[1:] == [[(0, 3)], [(3, 3)]]
    await gate.let()
    await gate.let()
    assert gate.until[1:] == [{session.number: 3}, {}]
    assert job.done.result() == 6


async def test_tokens_of_others_ride_along_with_a_replay_through_all_stages() -> None:
    gate = Gate(1)
    scheduler, lost, other = Scheduler(gate), Session(list(range(31)), held=30), Session([50])
    gate.replaced = [3]
    first, second = scheduler.start(lost, last), scheduler.start(other, last)
    await gate.let(SessionLostError(lost.number, 0))
    while not (first.done.done() and second.done.done()):
        await gate.let()
    assert [until for until in gate.until if until] == [{lost.number: 3}]
    assert (first.done.result(), second.done.result()) == (30, 50)


async def test_a_replay_goes_on_where_it_was_when_another_stage_is_lost() -> None:
    gate = Gate(1)
    scheduler, session = Scheduler(gate, chunk=64), Session(list(range(101)), held=100)
    gate.replaced = [3, 5]
    job = scheduler.start(session, last)
    gate.mended.set()
    await gate.let(SessionLostError(session.number, 0))
    await gate.let()
    await gate.let(NodeLostError("the worker is gone"))
    assert (gate.seen[-1], gate.until[-1]) == ([(64, 36)], {session.number: 3})
    await gate.let(SessionLostError(session.number, 0))
    for _ in range(3):
        await gate.let()
    assert gate.seen[-3:] == [[(0, 64)], [(64, 36)], [(100, 1)]]
    assert gate.until[-3:] == [{session.number: 5}, {session.number: 5}, {}]
    assert job.done.result() == 100


async def test_a_session_evicted_behind_a_replay_is_run_through_all_stages() -> None:
    gate = Gate(1)
    scheduler, session = Scheduler(gate), Session(list(range(31)), held=30)
    gate.replaced = [3]
    job = scheduler.start(session, last)
    await gate.let(SessionLostError(session.number, 0))
    await gate.let()
    await gate.let(SessionLostError(session.number, 0))
    assert (gate.seen[-1], gate.until[-1]) == ([(0, 31)], {})
    await gate.let(SessionLostError(session.number, 0))
    with pytest.raises(SessionLostError):
        job.done.result()


async def test_a_session_that_becomes_another_sequence_in_mid_replay_begins_where_all_hold_it() -> None:
    gate = Gate(1)
    scheduler, session = Scheduler(gate, chunk=16), Session(list(range(101)), held=100)
    gate.replaced = [3]
    job = scheduler.start(session, last)
    await gate.let(SessionLostError(session.number, 0))
    await gate.let()
    job.done.cancel()
    session.keep_prefix([*range(90), 7])
    while gate.waiting:
        await gate.let()
    again = scheduler.start(session, last)
    while not again.done.done():
        await gate.let()
    assert gate.seen[-5:] == [[(16, 16)], [(32, 16)], [(48, 16)], [(64, 16)], [(80, 11)]]
    assert gate.until[-5:] == [{}] * 5
    assert again.done.result() == 7


async def test_a_session_lost_twice_with_nobody_beside_it_is_an_error_of_its_own() -> None:
    gate = Gate(1)
    scheduler, lost = Scheduler(gate), Session([1, 2])
    first = asyncio.create_task(scheduler.run(lost, last))
    await gate.let(SessionLostError(lost.number, 0))
    await gate.let(SessionLostError(lost.number, 0))
    with pytest.raises(SessionLostError):
        await first
    assert not gate.waiting


async def test_chunks_behind_a_lost_one_are_not_believed() -> None:
    gate = Gate(2)
    session = Session(list(range(250)))
    done = asyncio.create_task(Scheduler(gate, chunk=100).run(session, last))
    await gate.let(SessionLostError(session.number, 0))
    await gate.let(SessionLostError(session.number, 0))  # the two that were behind it
    await gate.let(SessionLostError(session.number, 0))
    assert not done.done()
    for _ in range(3):
        await gate.let()
    assert done.result() == 249


async def test_a_failure_reaches_all_of_its_batch_and_nobody_else() -> None:
    gate = Gate(1)
    scheduler = Scheduler(gate)
    jobs = [asyncio.create_task(scheduler.run(Session([i]), last)) for i in (1, 2)]
    await settle()
    later = asyncio.create_task(scheduler.run(Session([3]), last))
    await gate.let(CakeError("the worker is gone"))
    await gate.let()
    for job in jobs:
        with pytest.raises(CakeError, match="gone"):
            await job
    assert later.result() == 3


@pytest.mark.parametrize("where", ["_take_few", "_take_prompt"])
async def test_a_mistake_of_our_own_reaches_all_who_wait_and_the_next_are_served(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    gate = Gate(2)
    scheduler = Scheduler(gate, chunk=100)
    generating = asyncio.create_task(generate(scheduler, Session([7]), 9))
    await gate.let()
    reading = asyncio.create_task(scheduler.run(Session(list(range(400))), last))
    await settle()

    def mistake(*arguments: object) -> None:
        raise RuntimeError("a mistake")

    with monkeypatch.context() as changed:
        changed.setattr(scheduler._departures, where, mistake)
        while gate.waiting:
            await gate.let()
    for waiting in (generating, reading):
        with pytest.raises(RuntimeError, match="a mistake"):
            await asyncio.wait_for(waiting, 1)
    later = asyncio.create_task(generate(scheduler, Session([50]), 2))
    await gate.let()
    await gate.let()
    assert await asyncio.wait_for(later, 1) == [50, 51, 52]
    assert not scheduler.busy


async def test_a_mistake_in_mending_reaches_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(1)

    async def mistake() -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(gate, "mend", mistake)
    waiting = asyncio.create_task(Scheduler(gate).run(Session([1]), last))
    await gate.let(NodeLostError("gone"))
    with pytest.raises(RuntimeError, match="a mistake"):
        await asyncio.wait_for(waiting, 1)


async def test_one_bad_choice_is_not_the_others() -> None:
    gate = Gate(1)
    scheduler = Scheduler(gate)

    def refuse(logits: Tensor) -> int:
        raise CakeError("not finite")

    bad = asyncio.create_task(scheduler.run(Session([1]), refuse))
    good = asyncio.create_task(scheduler.run(Session([2]), last))
    await gate.let()
    with pytest.raises(CakeError, match="not finite"):
        await bad
    assert good.result() == 2


async def test_who_leaves_is_sent_no_further() -> None:
    gate = Gate(1)
    scheduler = Scheduler(gate, chunk=10)
    session = Session(list(range(100)))
    gone = asyncio.create_task(scheduler.run(session, last))
    stays = asyncio.create_task(scheduler.run(Session([5]), last))
    await settle()
    gone.cancel()
    await gate.let()
    assert session.held == 0, "what came back for one who left is not counted on"
    assert stays.result() == 5
    assert len(gate.seen) == 1


async def test_a_job_that_follows_another_goes_when_that_has_been_sent() -> None:
    gate = Gate(1)
    scheduler, session = Scheduler(gate, chunk=64), Session(list(range(100)))
    first = scheduler.start(session, last, [100, 101])
    second = scheduler.follow(first, [102, 103], torch.flatten)
    scheduler.follow(second, [104], last)
    await settle()
    assert gate.seen == [[(0, 64)]], "a prompt goes in its chunks"
    await gate.let()
    assert gate.seen[1:] == [[(64, 38)], [(102, 2)], [(104, 1)]], "and then there is no waiting"
    await gate.let()
    assert (first.done.result(), session.held) == (101, 100), "what is only proposed does not count"
    await gate.let()
    assert second.done.result().tolist() == [102, 103]


async def test_those_that_follow_leave_room_for_others() -> None:
    gate = Gate(2)
    scheduler, session, other = Scheduler(gate), Session([1]), Session([50])
    job = first = scheduler.start(session, last)
    for token in range(2, 8):
        job = scheduler.follow(job, [token], last)
    await settle()
    assert gate.seen == [[(i, 1)] for i in range(7)]
    done = asyncio.create_task(scheduler.run(other, last))
    await settle()
    assert [s.session for s in gate.waiting[-1][0]] == [other.number], "at once"
    prompt = asyncio.create_task(scheduler.run(Session(list(range(200))), last))
    await settle()
    assert len(gate.waiting) == 8, "but no more than the stages have room for"
    while not prompt.done():
        await gate.let()
    assert (first.done.result(), job.done.result(), done.result(), prompt.result()) == (1, 7, 50, 199)


async def test_what_follows_a_job_that_is_sent_again_comes_to_nothing() -> None:
    gate = Gate(1)
    scheduler, session, lost = Scheduler(gate), Session([1]), Session([50])
    other, first = scheduler.start(lost, last), scheduler.start(session, last)
    second = scheduler.follow(first, [2], last)
    third = scheduler.follow(second, [3], last)
    await settle()
    assert gate.seen == [[(0, 1), (0, 1)], [(1, 1)], [(2, 1)]]
    await gate.let(SessionLostError(lost.number, 0))
    assert (second.done.result(), third.done.result()) == (None, None), "they may have run on something else"
    for _ in range(3):
        await gate.let()
    assert (first.done.result(), other.done.result()) == (1, 50)
    assert session.held == 1


async def test_what_follows_a_job_whose_stage_is_lost_comes_to_nothing() -> None:
    gate = Gate(1)
    scheduler, session = Scheduler(gate), Session([1])
    first = scheduler.start(session, last)
    before = scheduler.follow(first, [2], last)
    await gate.let(NodeLostError("the worker is gone"))
    meanwhile = scheduler.follow(first, [2], last)
    await settle()
    gate.mended.set()
    await settle()
    assert (before.done.result(), meanwhile.done.result()) == (None, None)
    while not first.done.done():
        await gate.let()
    assert first.done.result() == 1
