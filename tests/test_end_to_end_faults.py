"""Real processes that are stopped, killed or pestered, and what becomes of the answers."""

import contextlib
import functools
import json
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PROMPTS, CakeProcess, N
from real_processes import GREEDY, Cli, Start, answered, memory, start_workers, until_stop

from cake import kernels
from cake.generator import Generator, Piece
from cake.model.tokenizer import Tokenizer
from cake.topology import load_topology


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


@pytest.mark.skipif(not kernels.instruction_sets(), reason="torch's sums depend on the number of rows")
def test_a_replay_rounds_as_the_tokens_did(processes: Start, cli: Cli, tmp_path: Path) -> None:
    """In bfloat16 too the answer goes on as it would have, though its tokens are run again in one go."""
    topology, workers = start_workers(processes, tmp_path, "0-9", "10-29", dtype="bfloat16")
    prompt = "Explain in detail how a steam engine works, step by step."
    ask = ("--topology", topology, "-n", 220, "--prompt", prompt, "--temperature", 0, "--adopt")
    ask = (*ask, "--dtype", "bfloat16", "--threads", 1)
    undisturbed = cli(*ask)
    master = processes(*ask)
    master.wait_for("norm, head")
    assert master.process.stdout is not None
    start = master.process.stdout.read(300)
    workers[1].process.kill()
    rest = master.process.stdout.read()
    assert "blocks 10-29 are lost; loading them here" in master.finish()[2]
    assert start + rest == undisturbed.stdout


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
