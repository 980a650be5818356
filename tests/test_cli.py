"""The command line: what a person types wrong, and what they then read."""

import json
import shutil
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import IMPATIENT, PATIENT, make_tiny_llama
from msgspec import structs

import cake
from cake import master
from cake.cli import main, split_model
from cake.protocol.frames import encode
from cake.protocol.messages import VERSION, Goodbye, Message, SpanInfo, Welcome
from cake.weights.checkpoint import Checkpoint

TOPOLOGY = "worker0:\n  host: 127.0.0.1:{port}\n  layers: [model.layers.{layers}]\n"


@pytest.fixture(scope="module")
def speaking_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the demo model's tokenizer, and as many tokens."""
    return with_tokenizer(make_tiny_llama(tmp_path_factory.mktemp("speaking"), vocab_size=49152), demo_model)


def with_tokenizer(folder: Path, demo_model: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model / name, folder)
    return folder


@pytest.fixture
def folder(speaking_model: Path, tmp_path: Path) -> Path:
    """A model folder that a test may damage."""
    return shutil.copytree(speaking_model, tmp_path / "tiny")


def topology_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "topology.yml"
    path.write_text(text)
    return path


def check_refusal(result, *substance: str) -> None:
    """One line on stderr that says these things, exit code 2, nothing on stdout."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    for words in substance:
        assert words in lines[0]


@pytest.mark.parametrize(
    ("text", "substance"),
    [
        ("{", "not YAML"),
        ("- a\n- b\n", "must be a map"),
        ("w: {host: 'a:1', layers: [model.layers.0], speed: 3}", "unknown key 'speed'"),
        ("w: {host: laptop, layers: [model.layers.0]}", "write host:port"),
        ("w: {host: 'a:1', layers: [model.layers.5-2]}", "ends before it begins"),
        (
            "a: {host: 'a:1', layers: [model.layers.0-2]}\nb: {host: 'b:1', layers: [model.layers.2]}",
            "'a' and 'b' both claim block 2",
        ),
        (TOPOLOGY.format(port=1, layers="4-6"), "the model's last block is 5"),
    ],
)
def test_a_bad_topology_is_explained(cli, folder: Path, tmp_path: Path, text: str, substance: str) -> None:
    result = cli("--model", folder, "--topology", topology_file(tmp_path, text))
    check_refusal(result, substance)


@pytest.mark.parametrize("mode", ["master", "worker"])
def test_a_missing_topology_file_is_named(cli, mode: str) -> None:
    check_refusal(cli("--mode", mode, "--topology", "/nowhere.yml"), "/nowhere.yml", "No such file")


def test_a_worker_beyond_the_last_block_is_refused(cli, folder: Path, tmp_path: Path) -> None:
    path = topology_file(tmp_path, TOPOLOGY.format(port=1, layers="4-6"))
    result = cli("--mode", "worker", "--model", folder, "--topology", path, "--address", "127.0.0.1:0")
    check_refusal(result, "claims block 6", "last block is 5")


def test_a_worker_needs_a_topology_and_a_name_in_it(cli, tmp_path: Path) -> None:
    check_refusal(cli("--mode", "worker"), "--topology")
    path = topology_file(tmp_path, TOPOLOGY.format(port=1, layers="0"))
    result = cli("--mode", "worker", "--topology", path, "--name", "laptop")
    check_refusal(result, "'laptop'", "worker0")
    two = TOPOLOGY.format(port=1, layers="0") + TOPOLOGY.format(port=2, layers="1").replace("0:", "1:", 1)
    result = cli("--mode", "worker", "--topology", topology_file(tmp_path, two))
    check_refusal(result, "--name", "worker0, worker1")


def test_a_missing_model_folder_is_named(cli) -> None:
    check_refusal(cli("--model", "/no/such/model"), "no model folder at /no/such/model")


def test_a_model_that_is_neither_a_folder_nor_a_hub_id_is_explained(cli, folder: Path) -> None:
    check_refusal(
        cli("--model", "Llama-9"), "no model folder at Llama-9; a hub id has the form organisation/name"
    )
    file = folder / "model.safetensors"
    check_refusal(cli("--model", file), f"{file} is a file; name the folder with config.json")


def test_a_folder_without_config_is_named(cli, tmp_path: Path) -> None:
    check_refusal(cli("--model", tmp_path), "no config.json")


def test_a_folder_without_weights_is_named(cli, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    check_refusal(cli("--model", folder), "no weights")


def test_a_truncated_file_is_named_with_the_offset(cli, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    check_refusal(cli("--model", folder), str(path), f"offset {path.stat().st_size}", "truncated")


def test_a_corrupt_file_is_named_with_the_offset(cli, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 4) + b"oops" + path.read_bytes()[12:])
    check_refusal(cli("--model", folder), str(path), "offset 8", "not a JSON map")


def test_a_missing_shard_is_named(cli, demo_model: Path, tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "sharded", shard_size="200KB", vocab_size=49152)
    with_tokenizer(folder, demo_model)
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    shard.unlink()
    check_refusal(cli("--model", folder), shard.name, "is missing")


def test_a_tensor_of_the_wrong_shape_is_named(cli, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    check_refusal(cli("--model", folder), "gate_proj.weight has shape [96, 64]", "asks for [128, 64]")


def test_an_unsupported_architecture_is_named_with_those_supported(cli, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    check_refusal(cli("--model", folder), "GPT2LMHeadModel", "LlamaForCausalLM")


def test_an_address_in_use_is_named(cli, folder: Path, tmp_path: Path) -> None:
    path = topology_file(tmp_path, TOPOLOGY.format(port=1, layers="0"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        arguments = ("--mode", "worker", "--model", folder, "--topology", path, "--address", address)
        check_refusal(cli(*arguments), address, "in use")
        check_refusal(cli("--model", folder, "--api", address), f"--api {address} is in use")


@pytest.mark.parametrize("text", ["localhost", ":", ":8080", "8080", "", "localhost:99999", "::1:8080"])
def test_a_malformed_address_is_explained_by_a_good_one(cli, text: str) -> None:
    result = cli("--mode", "worker", "--topology", "/nowhere.yml", "--address", text)
    check_refusal(result, f"--address: {text!r} is not an address", "such as 0.0.0.0:10128")
    check_refusal(cli("--api", text), f"--api: {text!r} is not an address", "such as 127.0.0.1:8080")


def test_a_port_that_is_too_high_is_called_so(cli) -> None:
    check_refusal(cli("--api", "localhost:99999"), "ports end at 65535")


def test_an_unreachable_worker_is_named(cli, folder: Path, tmp_path: Path, monkeypatch) -> None:
    with socket.socket() as unused:  # bound, but not listening: connections are refused
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        monkeypatch.setattr(master, "Patience", lambda **_: IMPATIENT)
        path = topology_file(tmp_path, TOPOLOGY.format(port=port, layers="0"))
        result = cli("--model", folder, "--topology", path)
    assert result.exit_code == 2
    assert f"worker 'worker0' at 127.0.0.1:{port} cannot be reached" in result.stderr
    assert "cake-cli --mode worker --name worker0" in result.stderr


def wire(message: Message) -> bytes:
    return b"".join(map(bytes, encode(message)))


UNFIT = {
    "HTTP": (b"HTTP/1.0 400 Bad Request\r\n\r\n", "does not speak Cake's protocol"),
    "silence": (b"", "accepts connections but does not answer"),
    "refusal": (wire(Goodbye("this worker is 'attic', not 'worker0'")), "refused: this worker is 'attic'"),
    "another version": ({"version": 9}, "speaks protocol version 9"),
    "another model": ({"model": "0123456789abcdef"}, "serves another model"),
    "other weights": ({"spans": (SpanInfo(0, 2, "0123456789abcdef"),)}, "serves another model: the weights"),
    "other blocks": ({"spans": (SpanInfo(0, 3, ""),)}, "serves blocks 0-3, but this topology says 0-2"),
}


@pytest.mark.parametrize(("reply", "substance"), UNFIT.values(), ids=UNFIT)
def test_a_worker_that_will_not_do_is_explained(
    cli, folder: Path, tmp_path: Path, monkeypatch, reply: bytes | dict[str, Any], substance: str
) -> None:
    checkpoint = Checkpoint(folder)
    mark = checkpoint.span_fingerprint(range(3)) or ""
    good = Welcome(
        VERSION,
        "fake",
        "worker0",
        checkpoint.config.fingerprint,
        (SpanInfo(0, 2, mark),),
        "cpu",
        "float32",
        "float32",
        99,
        99,
        "",
        0.0,
    )
    answer = reply if isinstance(reply, bytes) else wire(structs.replace(good, **reply))
    monkeypatch.setattr(master, "Patience", lambda **_: replace(PATIENT, handshake=0.3 if not answer else 20))
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(answer)
                peer.recv(4096)  # until the master hangs up

        thread = threading.Thread(target=serve)
        thread.start()
        path = topology_file(tmp_path, TOPOLOGY.format(port=server.getsockname()[1], layers="0-2"))
        check_refusal(cli("--model", folder, "--topology", path), "worker 'worker0' at 127.0.0.1:", substance)
        thread.join()


@pytest.mark.parametrize("prompt", ["", "bad \udcff bytes"])
def test_a_prompt_that_is_no_text_is_refused(cli, folder: Path, prompt: str) -> None:
    check_refusal(cli("--model", folder, "--raw", "--prompt", prompt), "")


def test_a_prompt_longer_than_the_context_names_both_numbers(cli, folder: Path) -> None:
    result = cli("--model", folder, "--raw", "--prompt", "1234567890", "--context", "8")
    assert result.exit_code == 2
    assert "the prompt has 10 tokens and the context holds 8" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_context_beyond_the_models_is_refused(cli, folder: Path) -> None:
    check_refusal(cli("--model", folder, "--context", "5000"), "--context 5000", "2048")


def test_a_device_that_is_not_here_is_named(cli, folder: Path) -> None:
    check_refusal(cli("--model", folder, "--device", "abacus"), "'abacus'", "present: cpu")


def test_a_draft_model_that_is_not_there(cli, folder: Path) -> None:
    check_refusal(
        cli("--model", folder, "--draft-model", "/no/such/draft"), "no model folder at /no/such/draft"
    )


@pytest.mark.parametrize("other", ["more tokens", "other tokens"])
def test_a_draft_model_with_another_vocabulary_is_refused_by_name(
    cli, folder: Path, tmp_path: Path, other: str
) -> None:
    draft = shutil.copytree(folder, tmp_path / "stranger")
    name = "config.json" if other == "more tokens" else "tokenizer.json"
    words = ("49152", "49280") if other == "more tokens" else ("<file_sep>", "<page_sep>")
    text = (draft / name).read_text(encoding="utf-8")
    assert words[0] in text
    (draft / name).write_text(text.replace(*words), encoding="utf-8")
    result = cli("--model", folder, "--draft-model", draft)
    check_refusal(result, "--draft-model stranger has another vocabulary than tiny")


def test_debug_shows_the_traceback(cli) -> None:
    result = cli("--model", "/no/such/model", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: no model folder")


@pytest.mark.parametrize(
    "option",
    [
        ["-n", "0"],
        ["--temperature", "-1"],
        ["--top-p", "0"],
        ["--dtype", "int8"],
        ["--top-p", "nan"],
        ["--bogus"],
    ],
)
def test_options_out_of_range_are_usage_errors(cli, option: list[str]) -> None:
    result = cli(*option)
    assert result.exit_code == 2
    assert option[0] in result.stderr


@pytest.mark.parametrize("key", ["", None])
def test_an_empty_cluster_key_is_refused_and_an_empty_variable_is_none(cli, monkeypatch, key) -> None:
    """Who types `--cluster-key "$KEY"` shall not go on without one."""
    monkeypatch.setenv("CAKE_CLUSTER_KEY", "")
    arguments = ["--mode", "worker", "--topology", "/nowhere.yml"]
    if key is None:
        check_refusal(cli(*arguments), "/nowhere.yml")
    else:
        check_refusal(cli(*arguments, "--cluster-key", key), "the cluster key is empty")


def test_networks_that_are_none_are_refused(cli) -> None:
    arguments = ["--mode", "worker", "--topology", "/nowhere.yml", "--allow", "10.0.0.1", "--allow", "laptop"]
    check_refusal(cli(*arguments), "--allow", "'laptop'", "192.168.1.0/24")


def test_help_names_every_option_and_needs_no_torch() -> None:
    code = "import sys; from cake.cli import main; main(['--help'], standalone_mode=False);"
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    for parameter in main.params:
        assert parameter.opts[0] in output
    assert "Examples:" in output


@pytest.mark.parametrize("command", [main, split_model])
def test_version(command) -> None:
    assert cake.__version__ in CliRunner().invoke(command, ["--version"]).output


def test_defaults_are_those_of_the_documentation() -> None:
    defaults = {parameter.name: parameter.default for parameter in main.params}
    expected = {
        "mode": "master",
        "address": "127.0.0.1:10128",
        "prompt": "The sky is blue because ",
        "system_prompt": "You are a helpful AI assistant.",
        "sample_len": 100,
        "speculate": "none",
        "repeat_last_n": 128,
        "seed": 299792458,
    }
    assert {name: defaults[name] for name in expected} == expected


def test_split_model_refuses_what_does_not_fit(folder: Path, tmp_path: Path) -> None:
    path = topology_file(tmp_path, TOPOLOGY.format(port=1, layers="4-6"))
    arguments = ["--model-path", str(folder), "--topology", str(path), "--output", str(tmp_path / "out")]
    check_refusal(CliRunner().invoke(split_model, arguments), "claims block 6")
    assert not (tmp_path / "out").exists()


def test_a_master_with_a_workers_bundle_says_so_before_it_waits_for_the_worker(
    folder: Path, cli, tmp_path: Path
) -> None:
    path = topology_file(tmp_path, TOPOLOGY.format(port=1, layers="0-2"))
    arguments = ["--model-path", str(folder), "--topology", str(path), "--output", str(tmp_path / "out")]
    assert CliRunner().invoke(split_model, arguments).exit_code == 0
    result = cli("--model", tmp_path / "out" / "worker0-node")
    check_refusal(result, "has no tensor model.norm.weight; it is the bundle of another node or role")
