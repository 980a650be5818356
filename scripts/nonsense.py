"""Mutated frames, sent to a real worker beside a master who must not notice: `chaos.py` runs this."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from faults import Device, Ending, Play, node, tell, tell_first
from intruders import FLAT, NAME, growth, served, stranger
from meddler import between, record
from mutations import bent, frames_in, mutated, spoken, whole

from cake.errors import ProtocolError
from cake.protocol.frames import HANDSHAKE_LIMITS, MAX_HEADER, FrameReader, Limits
from cake.protocol.handshake import MAX_BATCH_TOKENS, hello, payload_limit
from cake.protocol.messages import Forward, Hello, Link, Message
from cake.protocol.states import Conversation
from cake.topology import Topology

LANES = 16  # connections at once
PER_CONNECTION = 16  # frames; the first that is refused, or cut short, ends it
ANSWER_S = 10.0  # in which a worker must answer, or hang up
READ_BYTES = 1 << 16
GREETED = whole(hello(NAME))


class SurpriseError(Exception):
    """A worker did not do what it must."""


Reaction = Literal["hang up", "answer", "wait for more", "go on"]


class Oracle:
    """Foretells what a worker must do about the bytes that a connection brings, as far as they decide it."""

    def __init__(self, welcomed: bool, payload: int) -> None:
        """`payload` is the most bytes of a tensor that it takes after the welcome."""
        self._frames, self._conversation = FrameReader(HANDSHAKE_LIMITS), Conversation()
        self._payload = payload
        if welcomed:
            self._welcome()

    def _welcome(self) -> None:
        self._frames.limits, self._conversation.state = Limits(MAX_HEADER, self._payload), "ready"

    def reaction(self, data: bytes) -> Reaction:
        """What the worker must do when these bytes have come."""
        try:
            messages = [frame.message for frame in self._frames.feed(data)]
            for message in messages:
                self._conversation.said("master", message)
        except ProtocolError:
            return "hang up"
        if self._conversation.state == "over":
            return "hang up"
        if self._conversation.state == "greeted":
            self._welcome()  # or it hangs up, which is an answer too
        if any(isinstance(message, Hello | Forward | Link) for message in messages):
            return "answer"
        return "wait for more" if self._frames.mid_frame else "go on"


@dataclass
class Nonsense:
    """What there is to send, and how much of it was sent in which state of the conversation."""

    messages: list[Message]
    frames: list[bytes]  # theirs, and those that a master said
    numbers: Iterator[int]
    payload: int  # bytes of the largest tensor that the worker takes
    before: int = 0  # frames before the handshake is over
    after: int = 0
    reactions: Counter[str] = field(default_factory=Counter)

    def one(self, chance: random.Random) -> bytes:
        """A frame; one in twenty is as it should be, so that there are sessions to get wrong."""
        kind = chance.random()
        if kind < 0.05:
            return chance.choice(self.frames)
        return mutated(chance, self.frames) if kind < 0.5 else bent(chance, chance.choice(self.messages))

    async def lane(self, device: Device, seed: int) -> None:
        """One connection after another."""
        chance = random.Random(seed)
        for _ in self.numbers:
            async with stranger(device) as (reader, writer):
                await self._talk(reader, writer, chance)

    async def _talk(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, chance: random.Random
    ) -> None:
        """Frames, one time in four before a hello, until the worker hangs up or waits for more.

        Raises `SurpriseError` where it does not do what it must.
        """
        welcomed = chance.random() < 0.75
        if welcomed:
            writer.write(GREETED)
            await asyncio.wait_for(reader.read(READ_BYTES), ANSWER_S)
        oracle = Oracle(welcomed, self.payload)
        for _ in range(PER_CONNECTION):
            data = self.one(chance)
            self.after += welcomed
            self.before += not welcomed
            reaction = oracle.reaction(data)
            self.reactions[reaction] += 1
            if not await _react(reader, writer, data, reaction) or next(self.numbers, None) is None:
                return


async def _react(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes, expected: Reaction
) -> bool:
    """Send, and wait for what must come; whether the conversation goes on."""
    writer.write(data)
    try:
        if expected == "hang up":
            await asyncio.wait_for(reader.read(), ANSWER_S)
        elif expected == "answer":
            return bool(await asyncio.wait_for(reader.read(READ_BYTES), ANSWER_S))
    except ConnectionError:
        return False
    except asyncio.TimeoutError as error:
        port = writer.get_extra_info("sockname")[1]
        raise SurpriseError(f"from port {port}, no sign to {expected} after {data[:300]!r}") from error
    return expected == "go on"


async def recorded(play: Play, topology: Topology) -> list[bytes]:
    """The frames that a good master says."""
    said: list[bytes] = []
    here = topology.nodes[NAME]
    async with between((here.host, here.port), record(said)) as (host, port):
        relayed = Topology({NAME: replace(here, host=host, port=port)})
        async with play.master(relayed) as generator:
            await tell_first(generator, play.prompt())
    return list(frames_in(b"".join(said)))


async def mutated_frames(play: Play, n: int = 100_000) -> Ending:
    """Mutations of every message, before and after the handshake, beside a master that answers."""
    with play.cast(node(NAME, 0, 29)) as topology:
        device, hidden_size = play.devices[NAME], play.checkpoint.config.hidden_size
        messages = spoken(NAME, hidden_size)
        frames = [*map(whole, messages), *await recorded(play, topology)]
        payload = payload_limit(MAX_BATCH_TOKENS, hidden_size)
        nonsense = Nonsense(messages, frames, iter(range(n // 10)), payload)
        async with play.master(topology) as generator:
            right = await tell(generator, play.prompt())
            alone = await tell(generator, play.prompt())
            await asyncio.gather(*(nonsense.lane(device, -1 - seed) for seed in range(LANES)))
            memory, files = await device.settled_bytes(), open_files(device)  # with what it keeps for good
            nonsense.numbers = iter(range(n - n // 10))
            began = time.perf_counter()
            lanes = [asyncio.create_task(nonsense.lane(device, seed)) for seed in range(LANES)]
            told = []
            while not all(lane.done() for lane in lanes):
                told.append(await tell(generator, play.prompt()))
            await asyncio.gather(*lanes)
            rate = 0.9 * n / (time.perf_counter() - began)
        at_once = await served(play, topology)
        after, more = await device.settled_bytes(), open_files(device) - files + 1  # the master has left
    same, stall = sum(each.ids == right.ids for each in told), max(each.stall for each in told)
    tracebacks = sum("Traceback" in line for line in device.said)
    seen = (
        f"{n} frames at {rate:.0f}/s, {nonsense.before} before and {nonsense.after} after the handshake; "
        f"{nonsense.reactions['hang up']} refused and {nonsense.reactions['answer']} answered, as foretold; "
        f"{same} of {len(told)} texts beside them identical, the longest gap {stall:.2f} s (alone "
        f"{alone.stall:.2f}); then a master within {1e3 * at_once:.0f} ms; {growth(memory, after)}; "
        f"{tracebacks} tracebacks, {more:+d} open files"
    )
    held = same == len(told) > 0 and after <= FLAT * memory and not tracebacks and more <= 0
    return Ending(held, seen)


def open_files(device: Device) -> int:
    """Sockets included."""
    assert device.process is not None
    return len(list(Path(f"/proc/{device.process.pid}/fd").iterdir()))
