"""Shared parts of the tests: tiny random Llamas, the demo model, loopback workers, real processes."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from filelock import FileLock

from cake.budget import CacheBudget
from cake.cli import main
from cake.device import DeviceThread
from cake.dialling import Patience
from cake.generator import Generator
from cake.memory import memory_of
from cake.model.linear import Placement
from cake.model.sampling import SamplingParams
from cake.model.tokenizer import Tokenizer
from cake.net.admission import parse_networks
from cake.net.listener import bind
from cake.net.tls import Credentials
from cake.pipeline import Pipeline, open_pipeline
from cake.session import Session
from cake.stage import LocalStage
from cake.topology import Node, Topology
from cake.visit import Service
from cake.weights.checkpoint import Checkpoint
from cake.weights.demo_model import demo_model_folder
from cake.worker import Worker

PROMPTS = [
    "The sky is blue because ",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Die Hauptstadt von Frankreich ist",
    "1 2 3 4 5 6 7 8 9 10 11 12",
]
N = 64

torch.set_num_threads(1)
sys.path.append(str(Path(__file__).parents[1] / "scripts"))  # last, as a script may be called like a package

PATIENT = Patience()
IMPATIENT = Patience(total=0.5, first_pause=0.02, handshake=2.0)  # for workers that never come
GREEDY = SamplingParams(temperature=0, repeat_penalty=1)

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,  # far from a fresh model's near-zero logits, whose ties rounding would break
}


def pytest_configure(config: pytest.Config) -> None:
    """Temporary files of this run alone: other Cake processes leave notes among them, and heed them."""
    folder = tempfile.mkdtemp(prefix="cake-tests-")
    os.environ["TMPDIR"] = os.environ["TEMP"] = folder
    tempfile.tempdir = None  # as it was before it was asked for
    os.environ.pop("CAKE_CLUSTER_KEY", None)  # whoever runs the tests may have a cluster
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def make_tiny_llama(folder: Path, seed: int = 0, shard_size: str = "5GB", **changes: Any) -> Path:
    """Write a small random Llama as transformers would; `changes` go into its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # transformers starts these at 0 and 1
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama without a tokenizer. Not to be changed: copy it first."""
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's folder."""
    return demo_model_folder(lambda _: True)


@pytest.fixture(scope="session")
def expected(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """The ids that transformers generates after each prompt; asked once for all processes that test."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    file = shared / "expected.json"
    with FileLock(shared / "expected.lock"):
        if not file.exists():
            tokenizer = Tokenizer(demo_model)
            ids = {prompt: transformers_ids(demo_model, tokenizer.encode(prompt), N) for prompt in PROMPTS}
            file.write_text(json.dumps(ids))
        return json.loads(file.read_text())


@pytest.fixture
def thread() -> Iterator[DeviceThread]:
    """A CPU in float32 with one thread."""
    thread = cpu_thread()
    yield thread
    thread.close()


def cpu_thread(dtype: torch.dtype = torch.float32) -> DeviceThread:
    """A CPU with one thread; the caller closes it."""
    return DeviceThread(Placement(torch.device("cpu"), dtype), threads=1)


async def loaded_stage(
    checkpoint: Checkpoint, span: range, thread: DeviceThread, budget: CacheBudget | None = None
) -> LocalStage:
    """A stage of this process with the weights of `span`, for sessions of at most 512 tokens."""
    stage = LocalStage("here", span, checkpoint.config, 512, thread, budget)
    await thread.run(stage.load, checkpoint)
    return stage


@pytest.fixture
async def here(tiny_model: Path, thread: DeviceThread) -> LocalStage:
    """The first blocks of the tiny model in this process: what right results of a worker's are."""
    return await loaded_stage(Checkpoint(tiny_model), range(0, 3), thread)


@asynccontextmanager
async def serving(
    folder: Path,
    name: str,
    *spans: range,
    credentials: Credentials | None = None,
    allow: Sequence[str] = (),
    budget: CacheBudget | None = None,
) -> AsyncIterator[Node]:
    """A worker of this process on a free port of loopback; the node under which it is reached."""
    checkpoint, thread = Checkpoint(folder), cpu_thread()
    budget = budget or CacheBudget(thread.placement.device)
    stages = [await loaded_stage(checkpoint, span, thread, budget) for span in spans]
    marks = [checkpoint.span_fingerprint(span) or "" for span in spans]
    service = Service(
        node=name,
        model=checkpoint.config.fingerprint,
        hidden_size=checkpoint.config.hidden_size,
        context=budget.context(512),
        stages={stage.blocks.start: stage for stage in stages},
        fingerprints=marks,
        credentials=credentials,
        memory=memory_of(thread.placement.device),
    )
    worker = Worker(service, parse_networks(allow))
    listener = bind("127.0.0.1", 0)
    await worker.start(listener)
    try:
        yield Node(name, "127.0.0.1", listener.getsockname()[1], spans)
    finally:
        await worker.close("the test is over")
        thread.close()


@asynccontextmanager
async def pipeline_over(
    folder: Path,
    *nodes: Node,
    patience: Patience = PATIENT,
    credentials: Credentials | None = None,
    budget: CacheBudget | None = None,
) -> AsyncIterator[Pipeline]:
    """A master's pipeline of this process over these nodes; it runs what they do not serve."""
    topology = Topology({node.name: node for node in nodes})
    pipeline = await open_pipeline(
        Checkpoint(folder), topology, cpu_thread(), 512, patience, credentials=credentials, budget=budget
    )
    try:
        yield pipeline
    finally:
        await pipeline.close()


@asynccontextmanager
async def spread(folder: Path, workers: Sequence[Sequence[range]]) -> AsyncIterator[Pipeline]:
    """A pipeline over fresh workers with these spans."""
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(serving(folder, f"w{i}", *spans))
            for i, spans in enumerate(workers)
        ]
        yield await stack.enter_async_context(pipeline_over(folder, *nodes))


class NoText:
    """A tokenizer for models that have none: every token is a letter."""

    def decode(self, ids: Sequence[int]) -> str:
        """One letter for each token."""
        return "".join(chr(ord("a") + i % 26) for i in ids)

    def token_bytes(self, token: int) -> bytes:
        """The same letter."""
        return self.decode([token]).encode()


async def greedy_ids(pipeline: Pipeline, prompt: Sequence[int], n: int, chunk: int = 512) -> list[int]:
    """The `n` tokens that follow `prompt` when the likeliest is always taken."""
    generator = Generator(pipeline, NoText(), frozenset(), chunk)  # type: ignore[arg-type]
    session = Session()
    pieces = [piece async for piece in generator.generate(session, prompt, GREEDY, n)]
    await generator.close_session(session)
    return [piece.token for piece in pieces]


def transformers_ids(folder: Path, prompt: Sequence[int], n: int) -> list[int]:
    """What `transformers` generates greedily, without stopping, from the same folder in float32."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    output = model.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=n,
        do_sample=False,
        temperature=None,
        top_p=None,
        repetition_penalty=1.0,
    )
    return output[0, len(prompt) :].tolist()


@pytest.fixture
def cli() -> Callable[..., Result]:
    """Runs `cake-cli` in this process: `cli("--model", folder)`; see `result.stderr`, `.exit_code`.

    Seconds faster than a process that imports everything again.
    """

    def run(*arguments: object, stdin: str | None = None, **environment: str) -> Result:
        return CliRunner().invoke(main, [str(a) for a in arguments], input=stdin, env=environment)

    return run


def _heed_ctrl_c() -> None:
    """A shell's background job ignores Ctrl-C, and so would the processes of tests that run in one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class CakeProcess:
    """A real `cake-cli` process; one with `--chat` listens to what the test says."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        command = [sys.executable, "-m", "cake", *map(str, arguments), "--threads", "1"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if "--chat" in arguments else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            preexec_fn=None if sys.platform == "win32" else _heed_ctrl_c,
        )
        self.stderr = ""

    def say(self, line: str) -> None:
        """Type a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def say_no_more(self) -> str:
        """Ctrl-D; what it has shown and not been asked for."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdin = None  # that it is closed, `communicate` does not expect
        return self.process.stdout.read()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read stderr until a line matches; fails when it ends before."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.stderr += line
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"the process ended without {pattern!r}:\n{self.stderr}")

    def finish(self) -> tuple[int, str, str]:
        """Wait for the end; exit code, stdout, stderr."""
        stdout, stderr = self.process.communicate(timeout=120)
        return self.process.returncode, stdout, self.stderr + stderr


@pytest.fixture
def processes() -> Iterator[Callable[..., CakeProcess]]:
    """Starts real `cake-cli` processes; what still runs at the end of the test is killed."""
    started: list[CakeProcess] = []

    def start(*arguments: object, **environment: str) -> CakeProcess:
        started.append(CakeProcess(*arguments, **environment))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
        each.process.communicate()


@pytest.fixture(scope="session")
def api_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server over two real workers and the demo model; its key is `API_KEY`."""
    from real_processes import API_KEY, start_workers
    from real_processes import GREEDY as GREEDY_OPTIONS

    started: list[CakeProcess] = []
    notes = str(tmp_path_factory.mktemp("notes"))  # of its own: it is there while other tests run

    def start(*arguments: object) -> CakeProcess:
        started.append(CakeProcess(*arguments, TMPDIR=notes, TEMP=notes))
        return started[-1]

    cluster = start_workers(start, tmp_path_factory.mktemp("api"), "0-14", "15-29")
    options = ("--topology", cluster.topology, "--api", "127.0.0.1:0", "--api-key", API_KEY)
    try:
        server = start(*options, "--context", 512, *GREEDY_OPTIONS)
        yield server.wait_for(r"(http://127\.0\.0\.1:\d+)/v1")[1]
    finally:
        for process in started:
            process.process.kill()
            process.finish()


def run(coroutine: Any) -> Any:
    """For tests that are not coroutines themselves."""
    return asyncio.run(coroutine)
