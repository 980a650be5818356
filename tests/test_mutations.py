"""Frames with something wrong in them: of every kind, most of them different, the same for the same seed."""

import random
from collections import Counter

from mutations import bent, frames_in, mutated, spoken, whole
from nonsense import Nonsense, Oracle

from cake.errors import ProtocolError
from cake.protocol.frames import MAX_HEADER, FrameReader, Limits
from cake.protocol.messages import MESSAGES, Alive, Goodbye, Leaving

SPOKEN = spoken("first", 8)
FRAMES = [whole(message) for message in SPOKEN]


def test_every_kind_of_message_is_among_them() -> None:
    assert {message.kind for message in SPOKEN} == set(MESSAGES)


def test_mutations_differ_from_what_they_were_made_of_and_a_seed_gives_them_again() -> None:
    changed = [mutated(random.Random(seed), FRAMES) for seed in range(300)]
    assert sum(each not in FRAMES for each in changed) > 240
    assert changed == [mutated(random.Random(seed), FRAMES) for seed in range(300)]


def test_bent_messages_reach_behind_the_prefix_and_some_are_believed() -> None:
    outcomes: Counter[str] = Counter()
    chance = random.Random(0)
    for _ in range(60):
        for message in SPOKEN:
            reader = FrameReader(Limits(MAX_HEADER, 1 << 20))
            try:
                (frame,) = reader.feed(bent(chance, message))
            except ProtocolError as error:
                assert "magic" not in str(error)
                outcomes["refused"] += 1
            else:
                outcomes["changed" if frame.message != message else "same"] += 1
    assert outcomes["refused"] > 400
    assert outcomes["changed"] > 40


def test_recorded_bytes_are_cut_into_frames() -> None:
    assert list(frames_in(b"".join(FRAMES))) == FRAMES
    assert list(frames_in(FRAMES[0] + FRAMES[1][:-3])) == [FRAMES[0], FRAMES[1][:-3]]
    assert list(frames_in(FRAMES[0] + b"CAK")) == FRAMES[:1]


def test_some_of_what_is_sent_is_sound() -> None:
    nonsense, chance = Nonsense(SPOKEN, FRAMES, iter(()), 1 << 20), random.Random(1)
    sound = sum(nonsense.one(chance) in FRAMES for _ in range(1000))
    assert 40 < sound < 250


def test_what_a_worker_must_do_is_foretold() -> None:
    hello, forward = FRAMES[0], FRAMES[2]
    new = Oracle(False, 1 << 20)
    assert [new.reaction(frame) for frame in (hello, whole(Alive(0, 0)), forward)] == [
        "answer",
        "go on",
        "answer",
    ]
    assert Oracle(False, 1 << 20).reaction(forward) == "hang up"
    ready = Oracle(True, 1 << 20)
    assert ready.reaction(whole(Alive(0, 0))) == "go on"
    assert ready.reaction(forward[:-1]) == "wait for more"
    assert ready.reaction(forward[-1:]) == "answer"
    assert ready.reaction(whole(Leaving())) == "hang up", "that is for workers to say"
    assert Oracle(True, 1 << 20).reaction(whole(Goodbye("enough"))) == "hang up"
    assert Oracle(True, 8).reaction(forward) == "hang up"
    assert Oracle(True, 1 << 20).reaction(b"GET / HTTP/1.1") == "hang up"
