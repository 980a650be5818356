"""What the command line gave: that no option is ignored without a word, and none forgotten."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from test_cli import check_refusal

from cake import given
from cake.cli import main
from cake.given import NEVER_EMPTY, OF_BOTH, OF_CLUSTER, OF_MASTER, OF_WORKER

OPTIONS = {parameter.name: parameter for parameter in main.params if parameter.expose_value}
# Of options that not every text is good for.
VALUES = {"api": "127.0.0.1:8080", "allow": "::1", "api_origin": "*", "top_p": "1"}


def typed(name: str) -> list[str]:
    """The option with some value that it takes."""
    option = OPTIONS[name]
    assert isinstance(option, click.Option)
    if option.is_flag:
        return [option.opts[-1]]
    kind = option.type
    value = kind.choices[0] if isinstance(kind, click.Choice) else VALUES.get(name, "9")
    return [option.opts[-1], str(value)]


class Read(Mapping[str, Any]):
    """What a command line without options gives, and which of it was asked for."""

    def __init__(self) -> None:
        self.names = set[str]()
        self._given = main.make_context("cake-cli", []).params

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return self._given[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)


def test_every_option_stands_in_the_table_once() -> None:
    assert sorted((*OF_BOTH, *OF_MASTER, *OF_WORKER)) == sorted(OPTIONS)


@pytest.mark.parametrize(
    ("options", "own"), [(given.master_options, OF_MASTER), (given.worker_options, OF_WORKER)]
)
def test_the_table_tells_who_reads_what(options: Callable[[Mapping[str, Any]], object], own: tuple) -> None:
    read = Read()
    options(read)
    assert read.names == {*OF_BOTH, *own} - {"mode", "debug"}  # which the command itself reads


@pytest.mark.parametrize("name", OF_MASTER)
def test_a_worker_takes_no_options_of_masters(cli, name: str) -> None:
    option = typed(name)
    check_refusal(cli("--mode", "worker", *option), f"{option[0]} is for a master", "leave out --mode worker")


@pytest.mark.parametrize("name", OF_WORKER)
def test_a_master_takes_no_options_of_workers(cli, name: str) -> None:
    option = typed(name)
    check_refusal(cli(*option), f"{option[0]} is for a worker", "--mode worker")


@pytest.mark.parametrize("name", [*OF_CLUSTER, "cluster_key", "dead_after"])
def test_a_master_without_workers_takes_no_options_about_them(cli, tmp_path: Path, name: str) -> None:
    option = typed(name)
    check_refusal(cli(*option), f"{option[0]} is for a master with workers", "--topology")
    check_refusal(cli(*option, "--topology", "/nowhere.yml"), "/nowhere.yml", "No such file")
    bundle(tmp_path)
    check_refusal(cli(*option, "--model", tmp_path), str(tmp_path / "topology.yml"), "must be a map")


def bundle(folder: Path) -> None:
    """As `cake-split-model` makes them, as far as they are looked at before the topology is read."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").touch()
    (folder / "topology.yml").touch()


def test_a_cluster_key_in_the_environment_may_be_of_no_use() -> None:
    result = CliRunner().invoke(
        main, ["--model", "/nowhere"], env={"CAKE_CLUSTER_KEY": "k", "CAKE_API_KEY": "k"}
    )
    check_refusal(result, "no model folder at /nowhere")


@pytest.mark.parametrize("name", NEVER_EMPTY)
def test_an_option_of_a_variable_that_is_not_set_is_refused(cli, name: str) -> None:
    """Who types `--api-key "$KEY"` shall not let in whoever comes with an empty one."""
    flag = typed(name)[0]
    check_refusal(cli(flag, ""), f"{flag} is empty; give it a value, or leave it out")


def test_a_raw_prompt_takes_no_system_prompt(cli) -> None:
    check_refusal(cli("--raw", "--system-prompt", "Be brief."), "--raw and --system-prompt")


def test_chat_and_json_exclude_one_another(cli) -> None:
    check_refusal(cli("--chat", "--json"), "--chat and --json")


def test_a_chat_takes_no_prompt(cli) -> None:
    check_refusal(cli("--chat", "--prompt", "Hello"), "--chat and --prompt")


def test_only_one_may_guess(cli) -> None:
    check_refusal(cli("--speculate", "ngram", "--draft-model", "x"), "--speculate ngram and --draft-model")
