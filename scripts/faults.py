"""What happens to devices that people own, done to real workers: `chaos.py` runs these.

Each fault is a coroutine that takes a `Stage` for the play and gives an `Ending`: whether what must hold
held, and what was seen.
"""

import asyncio
import contextlib
import itertools
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from cluster import served_port
from relay import Relay

from cake.device import DeviceThread
from cake.dialling import Patience
from cake.generator import Generator
from cake.model.linear import Placement
from cake.model.sampling import SamplingParams
from cake.model.tokenizer import Tokenizer
from cake.net.tls import Credentials
from cake.pipeline import Pipeline, open_pipeline
from cake.routes import Recovery
from cake.session import Session
from cake.topology import Node, Topology, dump_topology
from cake.weights.checkpoint import Checkpoint

GREEDY = SamplingParams(temperature=0, repeat_penalty=1)
PLACEMENT = Placement(torch.device("cpu"), torch.float32)
PROMPT = "Once upon a time, in a village by the sea,"
N_TOKENS = 48
TIDY_S = 6  # a worker gives back memory every five seconds


@dataclass(frozen=True)
class Ending:
    """Whether what must hold held, and what was seen."""

    held: bool
    seen: str


@dataclass
class Device:
    """A worker's process, which can be stopped, killed and started again at the same port."""

    node: Node
    command: list[str]
    process: "subprocess.Popen[str] | None" = None
    said: list[str] = field(default_factory=list)  # lines of its log

    def start(self) -> None:
        """Start it, and wait until it serves."""
        self.process = subprocess.Popen(self.command, stderr=subprocess.PIPE, text=True)
        port = served_port(self.process)
        threading.Thread(target=_drain, args=[self.process.stderr, self.said], daemon=True).start()
        self.node = Node(self.node.name, "127.0.0.1", port, self.node.spans, replica=self.node.replica)
        self.command[self.command.index("--address") + 1] = self.node.address

    def send(self, number: signal.Signals) -> None:
        """A signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """As by a power cut."""
        self.send(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    async def settled_bytes(self) -> int:
        """Its memory, when it has tidied up."""
        await asyncio.sleep(TIDY_S)
        return self.resident_bytes()

    def resident_bytes(self) -> int:
        """Its memory."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(status[1]) * 4096


def _drain(stream: IO[str], said: list[str]) -> None:
    """Or the process would block when the pipe is full."""
    with stream:
        said.extend(stream)


@dataclass
class Play:
    """The demo model, the devices that serve it, and the master that asks."""

    checkpoint: Checkpoint
    folder: Path
    devices: dict[str, Device] = field(default_factory=dict)

    @contextlib.contextmanager
    def cast(self, *nodes: Node, options: Sequence[str] = ()) -> "contextlib.Iterator[Topology]":
        """Start a device for each node."""
        file = self.folder / "topology.yml"
        file.write_text(dump_topology(Topology({node.name: node for node in nodes})))
        common = [sys.executable, "-m", "cake", "--mode", "worker", "--model", str(self.checkpoint.folder)]
        common += ["--topology", str(file), "--threads", "1", "--cpu", "--dtype", "float32", *options]
        self.devices = {}
        try:
            for node in nodes:
                device = Device(node, [*common, "--name", node.name, "--address", "127.0.0.1:0"])
                self.devices[node.name] = device
                device.start()
            yield Topology({name: device.node for name, device in self.devices.items()})
        finally:
            for device in self.devices.values():
                if device.process is not None and device.process.poll() is None:
                    device.kill()

    @contextlib.asynccontextmanager
    async def master(
        self,
        topology: Topology,
        recovery: Recovery | None = None,
        dead_after: float = 10,
        credentials: Credentials | None = None,
    ) -> AsyncIterator[Generator]:
        """A master in this process."""
        thread = DeviceThread(PLACEMENT, 1)
        patience = Patience(dead_after=dead_after)
        pipeline = await open_pipeline(
            self.checkpoint, topology, thread, 1024, patience, recovery=recovery, credentials=credentials
        )
        try:
            yield Generator(pipeline, Tokenizer(self.checkpoint.folder), frozenset())
        finally:
            await pipeline.close()

    def prompt(self) -> list[int]:
        """The ids of the prompt."""
        return Tokenizer(self.checkpoint.folder).encode(PROMPT)


@dataclass(frozen=True)
class Told:
    """An answer: its ids, and the seconds between them."""

    ids: list[int]
    gaps: list[float]

    @property
    def stall(self) -> float:
        """The longest wait for a token."""
        return max(self.gaps)


async def tell(
    generator: Generator, prompt: Sequence[int], at: int = -1, fault: Callable[[], object] = lambda: None
) -> Told:
    """Generate; the fault strikes after token `at`."""
    ids, times = list[int](), [time.perf_counter()]
    session = Session()
    async for piece in generator.generate(session, prompt, GREEDY, N_TOKENS):
        ids.append(piece.token)
        times.append(time.perf_counter())
        if len(ids) == at:
            fault()
    await generator.close_session(session)
    return Told(ids, [b - a for a, b in itertools.pairwise(times)])


def node(name: str, first: int, last: int, replica: bool = False) -> Node:
    """A node on a port that its device chooses."""
    return Node(name, "127.0.0.1", 1, (range(first, last + 1),), replica=replica)


def three() -> tuple[Node, Node, Node]:
    """Two nodes, and one that stands in for the second."""
    return node("first", 0, 9), node("second", 10, 29), node("spare", 10, 29, replica=True)


def serving(pipeline: Pipeline, before: dict[str, int]) -> str:
    """Which of the two that serve the same blocks has computed since."""
    return max(("second", "spare"), key=lambda name: tokens_of(pipeline).get(name, 0) - before.get(name, 0))


def tokens_of(pipeline: Pipeline) -> dict[str, int]:
    """Tokens that each node has computed."""
    return {stage.node: stage.stats.tokens for stage in pipeline.stages}


async def killed_with_replica(play: Play, times: int = 20) -> Ending:
    """kill -9 in mid-answer, at random moments; another node serves the same blocks."""
    with play.cast(*three()) as topology:
        async with play.master(topology) as generator:
            prompt = play.prompt()
            right = await tell(generator, prompt)
            same, late = 0, list[float]()
            for _ in range(times):
                before, at = tokens_of(generator.pipeline), random.randint(1, N_TOKENS - 2)
                victim: list[Device] = []

                def strike(before: dict[str, int] = before, victim: list[Device] = victim) -> None:
                    victim.append(play.devices[serving(generator.pipeline, before)])
                    victim[0].kill()

                told = await tell(generator, prompt, at, strike)
                same += told.ids == right.ids
                await asyncio.to_thread(victim[0].start)  # the master must not fall silent meanwhile
                await there(generator.pipeline, 3)
                started = time.perf_counter()
                await tell_first(generator, [*prompt, *right.ids[:at]])
                late.append(told.stall - (time.perf_counter() - started))
    seen = f"{same} of {times} texts identical, stalls at most {max(late):.2f} s longer than the replay"
    return Ending(same == times and max(late) <= 1, seen)


async def tell_first(generator: Generator, prompt: Sequence[int]) -> None:
    """Run a prompt up to its first token."""
    session = Session()
    async for _ in generator.generate(session, prompt, GREEDY, 1):
        pass
    await generator.close_session(session)


async def there(pipeline: Pipeline, n: int) -> None:
    """Wait until so many workers are there."""
    while len(pipeline.crew.workers) < n:
        await pipeline.crew.news.wait(1)


async def killed_and_restarted(play: Play) -> Ending:
    """kill -9 in mid-answer; the worker is started again after three seconds."""
    return await _alone(play, lambda device: _later(3, device.kill(), device.start))


async def killed_and_adopted(play: Play) -> Ending:
    """kill -9 in mid-answer; the master loads the blocks itself."""
    return await _alone(play, lambda device: device.kill(), Recovery(adopt=True))


async def frozen(play: Play, seconds: float = 30) -> Ending:
    """SIGSTOP for half a minute: no reset ever comes."""

    def strike(device: Device) -> None:
        device.send(signal.SIGSTOP)
        asyncio.get_running_loop().call_later(seconds, device.send, signal.SIGCONT)

    return await _alone(play, strike, noticed_within=11)


async def _alone(
    play: Play,
    strike: Callable[[Device], object],
    recovery: Recovery | None = None,
    noticed_within: float = 0,
) -> Ending:
    """A fault of a worker whose blocks nobody else serves."""
    with play.cast(*three()[:2]) as topology:
        async with play.master(topology, recovery) as generator:
            return await _strike(play, generator, lambda: strike(play.devices["second"]), noticed_within)


async def _strike(
    play: Play, generator: Generator, strike: Callable[[], object], noticed_within: float = 0
) -> Ending:
    right = await tell(generator, play.prompt())
    noticed = list[float]()

    def struck() -> None:
        strike()
        watch = asyncio.create_task(_watch(generator.pipeline, noticed))
        watches.add(watch)

    watches: set[asyncio.Task[None]] = set()
    told = await tell(generator, play.prompt(), N_TOKENS // 2, struck)
    await asyncio.gather(*watches)
    same = told.ids == right.ids
    seen = f"{'identical' if same else 'ANOTHER'} text after {told.stall:.1f} s"
    if noticed_within:
        seen += f", noticed after {noticed[0]:.1f} s"
    return Ending(same and (not noticed_within or noticed[0] <= noticed_within), seen)


async def _watch(pipeline: Pipeline, noticed: list[float]) -> None:
    """When the crew finds that somebody is missing."""
    started, n = time.perf_counter(), len(pipeline.crew.workers)
    while len(pipeline.crew.workers) == n and time.perf_counter() - started < 60:
        await pipeline.crew.news.wait(60)
    noticed.append(time.perf_counter() - started)


def _later(seconds: float, _: object, action: Callable[[], object]) -> None:
    loop = asyncio.get_running_loop()
    loop.call_later(seconds, lambda: loop.run_in_executor(None, action))


async def link_frozen(play: Play) -> Ending:
    """A pulled cable: nothing passes for 20 seconds, and nobody is told."""

    def strike(relay: Relay) -> None:
        relay.freeze()
        asyncio.get_running_loop().call_later(20, relay.thaw)

    return await _behind_relay(play, strike, noticed_within=11)


async def link_cut(play: Play) -> Ending:
    """All connections reset; new ones are refused for five seconds."""

    def strike(relay: Relay) -> None:
        relay.cut()
        asyncio.get_running_loop().call_later(5, relay.restore)

    return await _behind_relay(play, strike, noticed_within=11)


async def _behind_relay(play: Play, strike: Callable[[Relay], object], noticed_within: float) -> Ending:
    with play.cast(*three()[:2]) as topology:
        second = topology.nodes["second"]
        async with Relay((second.host, second.port)) as relay:
            nodes = dict(topology.nodes)
            nodes["second"] = Node("second", *relay.address, second.spans)
            async with play.master(Topology(nodes)) as generator:
                return await _strike(play, generator, lambda: strike(relay), noticed_within)


async def eight_requests(play: Play) -> Ending:
    """kill -9 while eight answers are under way."""
    with play.cast(*three()) as topology:
        async with play.master(topology) as generator:
            right = await tell(generator, play.prompt())
            struck = iter([lambda: play.devices["second"].kill()])

            def strike() -> None:
                next(struck, lambda: None)()

            told = await asyncio.gather(
                *(tell(generator, play.prompt(), N_TOKENS // 2, strike) for _ in range(8))
            )
    same = sum(each.ids == right.ids for each in told)
    return Ending(same == 8, f"{same} of 8 texts identical, longest stall {max(t.stall for t in told):.1f} s")


async def masters_killed(play: Play, times: int = 50) -> Ending:
    """kill -9 of masters in mid-prompt."""
    with play.cast(node("first", 0, 29)) as topology:
        device, memory = play.devices["first"], list[int]()
        file = play.folder / "master.yml"
        file.write_text(dump_topology(topology))
        command = [
            sys.executable,
            "-m",
            "cake",
            "--model",
            str(play.checkpoint.folder),
            "--topology",
            str(file),
        ]
        command += ["--threads", "1", "--cpu", "--prompt", "word " * 900, "-n", "2", "--context", "1024"]
        for n in (3, times):
            for _ in range(n):
                await asyncio.to_thread(_kill_master, command)
            memory.append(await device.settled_bytes())
    seen = f"{memory[0] / 1e6:.0f} MB after the first three, {memory[1] / 1e6:.0f} MB after {times} more"
    return Ending(memory[1] <= 1.05 * memory[0], seen)


def _kill_master(command: list[str]) -> None:
    """Start a master, and kill it soon after it has sent its prompt."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as master:
        assert master.stderr is not None
        while b"norm, head" not in master.stderr.readline():
            pass
        time.sleep(random.uniform(0.1, 0.6))
        master.kill()


FAULTS = {
    "killed, a replica is there": killed_with_replica,
    "killed, restarted after 3 s": killed_and_restarted,
    "killed, --adopt": killed_and_adopted,
    "SIGSTOP for 30 s": frozen,
    "link frozen for 20 s": link_frozen,
    "link cut for 5 s": link_cut,
    "killed with 8 requests": eight_requests,
    "50 masters killed in mid-prompt": masters_killed,
}
