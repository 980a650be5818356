"""The demo model in real processes over real sockets, held against transformers."""

import asyncio
import contextlib
import functools
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import Result
from conftest import PATIENT, CakeProcess, cpu_thread, greedy_ids, run, transformers_ids
from filelock import FileLock

from cake import kernels
from cake.generator import Generator, Piece
from cake.model.tokenizer import Tokenizer
from cake.pipeline import open_pipeline
from cake.scheduler import Scheduler
from cake.session import Session
from cake.topology import load_topology
from cake.weights.checkpoint import Checkpoint, block_of
from cake.weights.split import split

PROMPTS = [
    "The sky is blue because ",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Die Hauptstadt von Frankreich ist",
    "1 2 3 4 5 6 7 8 9 10 11 12",
]
N = 64
LAYOUTS = {  # what each worker serves; the rest runs on the master
    "one worker": ["0-29"],
    "three workers": ["0-9", "10-19", "20-29"],
    "master at start, middle and end": ["3-9", "15-24, 26"],
}
CHUNKS = {"one worker": 512, "three workers": 7, "master at start, middle and end": 1}
GREEDY = ("--temperature", "0", "--repeat-penalty", "1", "--dtype", "float32")

Start = Callable[..., CakeProcess]
Cli = Callable[..., Result]


@pytest.fixture(scope="module")
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


class Cluster(NamedTuple):
    """Running workers, and the topology file under which a master finds them."""

    topology: Path
    workers: list[CakeProcess]


def until_stop(ids: list[int]) -> list[int]:
    """What is generated up to the demo model's end token, itself included."""
    return ids[: ids.index(2) + 1] if 2 in ids else ids


def answered(result: Result) -> dict:
    """What a master that runs in this process printed as JSON."""
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def start_workers(
    start: Start, folder: Path, *spans: str, quantize: str = "none", dtype: str = "float32"
) -> Cluster:
    """Real workers on free ports."""
    path = folder / "topology.yml"

    def write(addresses: list[str]) -> None:
        nodes = {
            f"worker{i}": {"host": address, "layers": [f"model.layers.{s}" for s in span.split(", ")]}
            for i, (address, span) in enumerate(zip(addresses, spans, strict=True))
        }
        path.write_text(json.dumps(nodes))  # JSON is YAML

    write(["127.0.0.1:1"] * len(spans))
    arguments = ("--mode", "worker", "--topology", path, "--address", "127.0.0.1:0", "--dtype", dtype)
    arguments = (*arguments, "--quantize", quantize)
    workers = [start(*arguments, "--name", f"worker{i}") for i in range(len(spans))]
    write([worker.wait_for(r" at (127\.0\.0\.1:\d+),")[1] for worker in workers])
    return Cluster(path, workers)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_text_is_that_of_one_machine(
    processes: Start, demo_model: Path, tmp_path: Path, expected: dict[str, list[int]], layout: str
) -> None:
    topology, _ = start_workers(processes, tmp_path, *LAYOUTS[layout])
    master = processes("--topology", topology, "--raw", "--prompt", PROMPTS[1], "-n", N, "--json", *GREEDY)

    async def in_this_process() -> None:
        checkpoint, tokenizer = Checkpoint(demo_model), Tokenizer(demo_model)
        pipeline = await open_pipeline(checkpoint, load_topology(topology), cpu_thread(), 512, PATIENT)
        try:
            answers = await asyncio.gather(
                *(greedy_ids(pipeline, tokenizer.encode(p), N, CHUNKS[layout]) for p in PROMPTS)
            )
            assert answers == [expected[prompt] for prompt in PROMPTS]
            await check_logits(pipeline, demo_model, tokenizer.encode(PROMPTS[1]))
        finally:
            await pipeline.close()

    run(in_this_process())
    code, stdout, stderr = master.finish()
    assert code == 0, stderr
    result = json.loads(stdout)
    assert result["token_ids"] == until_stop(expected[PROMPTS[1]])
    assert result["text"] == Tokenizer(demo_model).decode(result["token_ids"])
    assert result["prompt_tokens"] == len(Tokenizer(demo_model).encode(PROMPTS[1]))
    check_report(result, len(LAYOUTS[layout]))


async def check_logits(pipeline, folder: Path, prompt: list[int]) -> None:
    """The last position's logits are transformers', but for rounding."""
    from transformers import LlamaForCausalLM

    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        theirs = reference(torch.tensor([prompt])).logits[0, -1]
    ours = await Scheduler(pipeline, 512).run(Session(list(prompt)), lambda logits: logits[0].clone())
    assert (ours - theirs).abs().max() <= 1e-4


def check_report(result: dict, n_workers: int) -> None:
    """The JSON has the promised fields, and one message per worker's span and token."""
    assert result["finish_reason"] == ("stop" if result["token_ids"][-1] == 2 else "length")
    assert result["time_to_first_token_s"] > 0
    assert result["prefill_tokens_per_s"] > 0
    assert result["decode_tokens_per_s"] > 0
    assert result["peak_memory_bytes"] > 100e6
    stages = result["stages"]
    assert [stage["first_block"] for stage in stages] == sorted(s["first_block"] for s in stages)
    assert sum(s["last_block"] - s["first_block"] + 1 for s in stages) == 30
    # The prompt, then every token but the last.
    assert {stage["messages"] for stage in stages} == {len(result["token_ids"])}
    assert len({s["node"] for s in stages} - {"master"}) == n_workers
    for stage in stages:
        assert (stage["bytes_sent"] > 0) == (stage["node"] != "master")
        assert stage["bytes_received"] <= stage["bytes_sent"] * 1.1
        assert stage["compute_s"] > 0
        assert (stage["device"], stage["dtype"]) == ("cpu", "float32")


def test_bundles_alone_give_the_same_text(
    processes: Start, cli: Cli, demo_model: Path, tmp_path: Path, expected: dict[str, list[int]]
) -> None:
    topology = tmp_path / "topology.yml"
    with socket.socket() as reserved:  # the bundle's topology must name the worker's port
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
    topology.write_text(f"pc: {{host: '{address}', layers: [model.layers.5-24]}}")
    split(str(demo_model), topology, tmp_path / "parts")
    worker = ("--mode", "worker", "--model", tmp_path / "parts" / "pc-node", "--address", address)
    processes(*worker, "--dtype", "float32").wait_for("pc serves blocks 5-24")
    master = ("--model", tmp_path / "parts" / "master-node", "--threads", 1, "--raw", "--json", *GREEDY)
    result = answered(cli(*master, "--prompt", PROMPTS[1], "-n", N))
    assert result["token_ids"] == until_stop(expected[PROMPTS[1]])


def test_two_masters_at_once_get_the_text_of_one(
    processes: Start, tmp_path: Path, expected: dict[str, list[int]]
) -> None:
    topology, _ = start_workers(processes, tmp_path, "0-14", "15-29")
    common = ("--topology", topology, "--raw", "-n", N, "--json", *GREEDY)
    masters = [processes(*common, "--prompt", prompt) for prompt in PROMPTS[:2]]
    for prompt, master in zip(PROMPTS, masters, strict=False):
        assert json.loads(master.finish()[1])["token_ids"] == until_stop(expected[prompt])


def test_streamed_text_goes_to_stdout_and_the_rest_to_stderr(processes: Start) -> None:
    code, stdout, stderr = processes("--prompt", "Say hello.", "-n", 8, *GREEDY).finish()
    assert code == 0
    assert stdout.startswith("Hello")
    assert "SmolLM2-135M-Instruct: 30 blocks" in stderr
    assert "first after" in stderr
    assert "compute" in stderr


def test_the_same_seed_gives_the_same_text(cli) -> None:
    common = ("--prompt", "Tell me a story.", "-n", 12, "--temperature", "1", "--json", "--threads", 1)
    texts = [cli(*common, "--seed", seed).stdout for seed in (1, 1, 2)]
    first, again, other = (json.loads(text)["token_ids"] for text in texts)
    assert first == again != other


@pytest.mark.parametrize("options", [[], ["--speculate", "ngram"]], ids=["plain", "ngram"])
def test_chat_keeps_the_history_and_answers_every_line(demo_model: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "cake", "--chat", "-n", "16", "--threads", "1", *GREEDY, *options]
    lines = "What is 2+2?\n\nAnd 3+3?\n"
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120, check=True)
    first, second = done.stdout.splitlines()
    chat = [{"role": "system", "content": "You are a helpful AI assistant."}]
    lengths = []
    for question, answer in (("What is 2+2?", first), ("And 3+3?", second)):
        chat.append({"role": "user", "content": question})
        lengths.append(str(len(Tokenizer(demo_model).encode_chat(chat))))
        chat.append({"role": "assistant", "content": answer})
    assert re.findall(r"prompt of (\d+)", done.stderr) == lengths


REPEAT = (
    "Repeat the following text: The quick brown fox jumps over the lazy dog while the sun sets behind the "
    "hills, and the river runs quietly through the valley to the sea."
)


@pytest.mark.parametrize("proposer", ["ngram", "draft"])
def test_proposals_change_the_number_of_passes_only(
    processes: Start, cli: Cli, demo_model: Path, tmp_path: Path, proposer: str
) -> None:
    topology, _ = start_workers(processes, tmp_path, "10-29")
    options = ("--speculate", "ngram") if proposer == "ngram" else ("--draft-model", demo_model)
    common = ("--topology", topology, "--threads", 1, "--prompt", REPEAT, "-n", 24, "--json", *GREEDY)
    plain, guessed = answered(cli(*common)), answered(cli(*common, *options))
    assert (plain["proposed_tokens"], plain["accepted_tokens"]) == (0, 0)
    assert guessed["token_ids"] == plain["token_ids"]
    assert guessed["text"] == plain["text"]
    assert 0 < guessed["accepted_tokens"] <= guessed["proposed_tokens"]
    assert plain["finish_reason"] == "length"  # at an end token, proposals beyond it would not count
    passes = {stage["messages"] for stage in guessed["stages"]}
    assert passes == {len(plain["token_ids"]) - guessed["accepted_tokens"]}
    if proposer == "draft":  # it is the same model
        assert guessed["accepted_tokens"] >= guessed["proposed_tokens"] - 1


def test_a_draft_draws_the_same_text_from_the_same_seed(cli, demo_model: Path) -> None:
    common = ("--prompt", "Tell me a story.", "-n", 24, "--temperature", "0.8", "--json", "--threads", 1)
    common = (*common, "--dtype", "float32")
    plain, ngram, draft = (
        json.loads(cli(*common, *more).stdout)
        for more in ((), ("--speculate", "ngram"), ("--draft-model", demo_model))
    )
    assert plain["token_ids"] == ngram["token_ids"] == draft["token_ids"]
    assert draft["accepted_tokens"] > 0


def test_nodes_quantize_each_as_it_likes(processes: Start, cli: Cli, tmp_path: Path) -> None:
    topology, _ = start_workers(processes, tmp_path, "5-20", quantize="int8")
    for quantize in ("none", "int4"):
        options = (
            "--topology",
            topology,
            "--threads",
            1,
            "-n",
            16,
            "--quantize",
            quantize,
            "--json",
            *GREEDY,
        )
        result = answered(cli(*options, "--prompt", "What is the capital of France?"))
        here = "bfloat16" if kernels.library() else "float32"
        expected = here if quantize == "none" else quantize
        assert [stage["weights"] for stage in result["stages"]] == [expected, "int8", expected]
        assert "Paris" in result["text"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals to one process are POSIX")
def test_ctrl_c_ends_either_role_cleanly(processes: Start, cli: Cli, tmp_path: Path) -> None:
    topology, (worker,) = start_workers(processes, tmp_path, "0-29")
    master = processes("--topology", topology, "-n", 2000, "--raw", "--prompt", PROMPTS[1], *GREEDY)
    master.wait_for("norm, head")
    assert master.process.stdout is not None
    assert master.process.stdout.read(1)  # it is in the middle of its answer
    master.process.send_signal(signal.SIGINT)
    code, _, stderr = master.finish()
    assert (code, stderr.splitlines()[-1]) == (130, "interrupted")
    assert "Traceback" not in stderr
    answered(cli("--topology", topology, "--threads", 1, "-n", 2, "--json"))
    worker.process.send_signal(signal.SIGINT)
    code, _, stderr = worker.finish()
    assert code == 0
    assert stderr.count(" came") == stderr.count(" left") == 2
    assert stderr.splitlines()[-1].endswith("worker0 stopped")
    assert "Traceback" not in stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals to one process are POSIX")
def test_sigterm_lets_an_answer_finish_and_a_second_one_does_not(processes: Start, tmp_path: Path) -> None:
    def interrupted(n: int) -> tuple[CakeProcess, CakeProcess]:
        """A worker that was told to leave in the middle of an answer of `n` tokens, and its master."""
        topology, (worker,) = start_workers(processes, tmp_path, "0-29")
        options = ("--topology", topology, "-n", n, "--raw", "--prompt", PROMPTS[4], *GREEDY)
        master = processes(*options, "--rejoin-timeout", 0)
        master.wait_for("norm, head")
        assert master.process.stdout is not None
        assert master.process.stdout.read(1)
        worker.process.terminate()
        worker.wait_for("leaving within 30 s")
        return worker, master

    worker, master = interrupted(24)
    code, _, stderr = master.finish()
    assert (code, "will stop soon" in stderr) == (0, True), stderr
    assert worker.finish()[0] == 0
    worker, master = interrupted(2000)
    worker.process.terminate()
    code, _, stderr = worker.finish()
    assert code == 0
    assert stderr.splitlines()[-1].endswith("worker0 stopped")
    assert "Traceback" not in stderr
    assert master.finish()[0] == 2


def test_a_worker_that_does_not_come_back_ends_the_master_in_one_line(
    processes: Start, tmp_path: Path
) -> None:
    topology, (worker,) = start_workers(processes, tmp_path, "0-29")
    master = processes(
        *("--topology", topology, "-n", 2000, "--raw", "--prompt", PROMPTS[1], *GREEDY, "--rejoin-timeout", 1)
    )
    master.wait_for("norm, head")
    assert master.process.stdout is not None
    assert master.process.stdout.read(1)
    worker.process.kill()
    code, _, stderr = master.finish()
    assert code == 2
    assert "lost worker 'worker0' at 127.0.0.1:" in stderr
    assert stderr.splitlines()[-1].startswith("Error: nobody has served blocks 0-29 for 1 s")


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_an_answer_that_ends_with_an_error_is_not_lost(
    processes: Start,
    cli: Cli,
    demo_model: Path,
    tmp_path: Path,
    expected: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
    as_json: bool,
) -> None:
    topology, (worker,) = start_workers(processes, tmp_path, "0-29")

    async def kill_after_five(self: Generator, *arguments: Any) -> AsyncIterator[Piece]:
        async for piece in generate(self, *arguments):
            yield piece
            tokens.append(piece.token)
            if len(tokens) == 5:
                worker.process.kill()
                worker.process.wait()

    tokens: list[int] = []
    generate = Generator.generate
    monkeypatch.setattr(Generator, "generate", kill_after_five)
    common = ("--topology", topology, "--threads", 1, "-n", N, "--raw", "--prompt", PROMPTS[1], *GREEDY)
    result = cli(*common, "--rejoin-timeout", 0.5, *(["--json"] if as_json else []))
    assert result.exit_code == 2
    line = result.stderr.splitlines()[-1]
    assert line.startswith("Error: nobody has served blocks 0-29 for ")
    ids = expected[PROMPTS[1]][:5]
    text = Tokenizer(demo_model).decode(ids)
    if as_json:
        told = json.loads(result.stdout)
        assert (told["token_ids"], told["text"]) == (ids, text)
        assert (told["finish_reason"], f"Error: {told['error']}") == ("error", line)
    else:
        assert result.stdout == text + "\n"
        assert "5 tokens (error)" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a port may not be bound again at once")
def test_a_chat_outlives_a_worker(processes: Start, demo_model: Path, tmp_path: Path) -> None:
    topology, (worker,) = start_workers(processes, tmp_path, "0-29")
    address = load_topology(topology).node(None).address
    chat = processes("--chat", "--topology", topology, "-n", 200, *GREEDY, "--rejoin-timeout", 1)
    assert chat.process.stdout is not None
    chat.say("What is 2+2?")
    chat.wait_for(r"tokens \(stop\)")
    first = chat.process.stdout.readline()
    chat.say("Tell me a long story.")
    story = chat.process.stdout.read(1)
    worker.process.kill()
    chat.wait_for(r"^\d+ tokens \(error\)")
    chat.wait_for(
        "^Error: nobody has served blocks 0-29 for 1 s .* goes on with what there is of this answer"
    )
    chat.say("Are you there?")
    chat.wait_for("^Error: nobody has served blocks 0-29 for 1 s .* this line is forgotten")
    options = ("--mode", "worker", "--topology", topology, "--address", address, "--dtype", "float32")
    processes(*options)
    chat.wait_for("worker 'worker0' is there")
    chat.say("What is 3+3?")
    length = int(chat.wait_for(r"tokens \((?:stop|length)\).* prompt of (\d+)")[1])
    story, _, last = (story + chat.say_no_more()).rstrip("\n").rpartition("\n")
    history = [
        {"role": "system", "content": "You are a helpful AI assistant."},
        {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": first.rstrip("\n")},
        {"role": "user", "content": "Tell me a long story."},
        {"role": "assistant", "content": story},
        {"role": "user", "content": "What is 3+3?"},
    ]
    assert last
    assert length == len(Tokenizer(demo_model).encode_chat(history))
    assert chat.process.wait() == 0


def test_a_worker_killed_in_mid_answer_costs_no_token(
    processes: Start, demo_model: Path, tmp_path: Path, expected: dict[str, list[int]]
) -> None:
    topology, workers = start_workers(processes, tmp_path, "0-9", "10-29")
    master = processes("--topology", topology, "-n", N, "--raw", "--prompt", PROMPTS[1], *GREEDY, "--adopt")
    master.wait_for("norm, head")
    assert master.process.stdout is not None
    start = master.process.stdout.read(1)
    workers[1].process.kill()
    rest = master.process.stdout.read()
    code, _, stderr = master.finish()
    assert code == 0, stderr
    assert "blocks 10-29 are lost; loading them here" in stderr
    assert start + rest == Tokenizer(demo_model).decode(until_stop(expected[PROMPTS[1]])) + "\n"


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory from /proc")
@pytest.mark.parametrize(("blocks", "dtype"), [("0-29", "float32"), ("3", "bfloat16")])
def test_a_workers_memory_is_its_span_and_torch(
    processes: Start, cli: Cli, demo_model: Path, tmp_path: Path, blocks: str, dtype: str
) -> None:
    topology, (worker,) = start_workers(processes, tmp_path, blocks, dtype=dtype)
    common = ("--topology", topology, "--threads", 1, "-n", 8, "--temperature", 0, "--json")
    answered(cli(*common, "--prompt", "word " * 200))
    of_worker = memory(Path(f"/proc/{worker.process.pid}/status").read_text())
    code = "import torch; print(open('/proc/self/status').read())"
    idle = memory(subprocess.check_output([sys.executable, "-c", code], text=True))
    first, _, last = blocks.partition("-")
    checkpoint = Checkpoint(demo_model)
    wanted = range(int(first), int(last or first) + 1)
    names = [name for name in checkpoint.names() if block_of(name) in wanted]
    stored = sum(entry.end - entry.start for _, entry in map(checkpoint.find, names))  # in bfloat16
    span = stored * (2 if dtype == "float32" else 1)
    assert of_worker["VmHWM"] <= 1.1 * span + idle["VmHWM"]


KEY = {"CAKE_CLUSTER_KEY": "correct horse battery staple"}


def test_a_cluster_key_lets_in_who_knows_it_and_nobody_else(
    processes: Start, cli: Cli, tmp_path: Path, expected: dict[str, list[int]]
) -> None:
    topology, workers = start_workers(functools.partial(processes, **KEY), tmp_path, "0-14", "15-29")
    common = ("--topology", topology, "--raw", "--prompt", PROMPTS[1], "-n", N, "--json", *GREEDY)
    common = (*common, "--threads", 1)
    refusals = {
        "wants a cluster key": cli(*common),
        "refuses this cluster key": cli(*common, "--cluster-key", "Tr0ub4dor&3 Tr0ub4dor&3"),
    }
    for reason, refused in refusals.items():
        assert (refused.exit_code, refused.stdout) == (2, "")
        line = refused.stderr.splitlines()[-1]
        assert line.startswith("Error: worker 'worker")
        assert reason in line
    result = cli(*common, **KEY)
    assert answered(result)["token_ids"] == until_stop(expected[PROMPTS[1]])
    assert "carries between them" not in result.stderr
    for worker in workers:
        worker.process.terminate()
        log = worker.finish()[2]
        assert log.count("turned away") <= 2  # one fails first, and the other is not asked any more
        assert KEY["CAKE_CLUSTER_KEY"] not in log


@pytest.mark.parametrize(
    ("address", "key", "warned"),
    [("0.0.0.0:0", {}, True), ("0.0.0.0:0", KEY, False), ("127.0.0.1:0", {}, False)],
)
def test_a_worker_says_when_it_is_open_to_all(
    processes: Start, tmp_path: Path, address: str, key: dict[str, str], warned: bool
) -> None:
    topology = tmp_path / "topology.yml"
    topology.write_text("w: {host: '127.0.0.1:1', layers: [model.layers.3]}")
    worker = processes("--mode", "worker", "--topology", topology, "--address", address, **key)
    worker.wait_for("w serves blocks 3")
    assert ("whoever reaches 0.0.0.0:" in worker.stderr) == warned


STRANGERS = [
    b"",
    b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n",
    bytes(range(256)) * 4,
    struct.pack(">4sIQ", b"CAKE", 64, 2**63),
    struct.pack(">4sIQ", b"CAKE", 64, 3 * 10**9) + bytes(64),
    b"CAKETLS1" + bytes(32) + b"\x01\x00" + bytes(256),
]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory from /proc")
@pytest.mark.parametrize("key", [{}, KEY], ids=["plain", "keyed"])
def test_a_thousand_strangers_cost_no_memory_and_keep_nobody_out(
    processes: Start, cli: Cli, tmp_path: Path, key: dict[str, str]
) -> None:
    topology, (worker,) = start_workers(functools.partial(processes, **key), tmp_path, "0-29")
    node = load_topology(topology).node(None)
    common = ("--topology", topology, "--threads", 1, "-n", 2, "--json", *GREEDY)
    answered(cli(*common, **key))
    status = Path(f"/proc/{worker.process.pid}/status")
    before = memory(status.read_text())["VmHWM"]
    with contextlib.ExitStack() as stack:
        for i in range(1000):
            stranger = stack.enter_context(socket.create_connection((node.host, node.port)))
            with contextlib.suppress(OSError):
                stranger.send(STRANGERS[i % len(STRANGERS)])
        answered(cli(*common, **key))
    assert memory(status.read_text())["VmHWM"] <= before + 32 * 2**20


def memory(status: str) -> dict[str, int]:
    """The bytes in Linux's words about a process."""
    return {name: int(n) * 1024 for name, n in re.findall(r"(\w+):\s+(\d+) kB", status)}
