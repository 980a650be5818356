"""The measuring command: what it refuses, and what it prints while scenarios run and in the end."""

import json
import sys
from pathlib import Path

import pytest
from bench import bench
from click.testing import CliRunner, Result
from conftest import greedy_ids, spread
from scenarios import SCENARIOS
from trial import Bench, Outcome


def run(*arguments: object) -> Result:
    """The command in this process."""
    return CliRunner().invoke(bench, [str(each) for each in arguments])


@pytest.fixture
def overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scenario that takes no time to speak of."""

    async def scenario(bench: Bench) -> Outcome:
        """Two prompts."""
        async with spread(bench.checkpoint.folder, [[range(0, 6)]]) as pipeline:
            for length in (30, 20):
                bench.begin(pipeline)
                await greedy_ids(pipeline, list(range(length)), 2)
        return Outcome("two prompts", "nothing", 1.0, 2.0)

    monkeypatch.setitem(SCENARIOS, "overhead", scenario)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "no model folder at no/such/folder"),
        (["--trace", "trace.json"], "--trace shows one scenario; name it with --scenario"),
        (["--trace", "trace.json", "--scenario", "all"], "--trace shows one scenario"),
        (["--trace", "no-such/trace.json", "--scenario", "turn"], "cannot be written: No such file"),
    ],
)
def test_what_a_person_can_mend_ends_in_one_line(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_one_json_object_and_progress_beside_it(overhead: None, tiny_model: Path) -> None:
    result = run("--model", tiny_model, "--scenario", "overhead", "--dtype", "float32", "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["model"], told["dtype"], told["quantize"]) == (tiny_model.name, "float32", "none")
    assert (told["runs"], told["machine"]["python"]) == (5, sys.version.split()[0])
    (outcome,) = told["scenarios"]
    assert (outcome["scenario"], outcome["name"]) == ("overhead", "two prompts")
    assert (outcome["figure"], outcome["holds"]) == (1.0, False)
    first, second = result.stderr.splitlines()
    assert first == "1 of 1: overhead: Two prompts."
    assert second.startswith("  falls short: 1, bar ≥ 2 (nothing); took ")


def test_a_table_for_a_person(overhead: None, tiny_model: Path) -> None:
    result = run("--model", tiny_model, "--scenario", "overhead", "--scenario", "overhead")
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{tiny_model.name} in ")
    assert lines[2].split() == ["scenario", "measured", "figure", "bar"]
    assert [" ".join(line.split()) for line in lines[3:]] == ["two prompts nothing 1 ≥ 2 falls short"]


def test_a_trace_of_the_last_run(overhead: None, tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    result = run("--model", tiny_model, "--scenario", "overhead", "--trace", file)
    assert result.exit_code == 0, result.stderr
    events = json.loads(file.read_text())["traceEvents"]
    assert [event["args"]["tokens"] for event in events if event["ph"] == "X"] == [20, 1]
