"""What fewer bits cost in quality: every mode beside float32, over the standard library's documentation.

A mode is a way to keep weights or, with the blocks split between two workers, one in which hidden states
travel: from the master to each worker and back, in that dtype each time.

`bench.py --quality` calls this. The text, the docstrings of some modules of the Python that runs, is cut
into windows of at most 512 tokens, each a session of its own; the first 64 of a window (taken from the
end of the one before) only give context. Whole windows go through as a prompt does; from the first one
256 tokens go through one by one as well, as in generation, whose kernels may be others.
"""

import ast
import contextlib
import platform
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from cake.crew import Crew
from cake.device import DeviceThread
from cake.dialling import Patience
from cake.model.batch import Batch, Segment
from cake.model.linear import Placement, Quantization
from cake.model.llama import load_ends
from cake.model.tokenizer import Tokenizer
from cake.pipeline import Pipeline, open_pipeline
from cake.protocol.messages import WireTensor
from cake.protocol.tensors import from_wire, to_wire
from cake.routes import Routes
from cake.stage import Computed, LocalStage
from cake.text import columns
from cake.topology import Topology
from cake.weights.checkpoint import Checkpoint
from cake.weights.demo_model import NAME, cache_directory

MODES: tuple[Quantization, ...] = ("none", "int8", "int4")
WIRE = {f"{dtype} on the wire": dtype for dtype in ("bfloat16", "float16", "int8")}
WINDOW, CONTEXT, ONE_BY_ONE = 512, 64, 256
ROWS = 64  # positions whose distributions are held at once
MODULES = """
argparse ast bisect calendar cmd collections configparser contextlib csv dataclasses datetime difflib doctest
email enum fractions functools heapq http inspect json logging random statistics string subprocess tempfile
textwrap threading typing unittest urllib
"""
ONCE_INT4 = "the demo model's weights were 4-bit once (Q4_1), which flatters int4"


@dataclass(frozen=True)
class Quality:
    """How far a mode's predictions are from the float32 ones, on average over so many tokens."""

    mode: str
    run_as: str
    tokens: int
    kl_nats: float
    perplexity_percent: float
    same_top_percent: float
    note: str = ""


@dataclass(frozen=True)
class Window:
    """Token ids that run from position 0; `targets` follow the last `len(targets)` of them."""

    ids: list[int]
    targets: Tensor

    @property
    def context(self) -> int:
        """How many tokens at its start are not scored."""
        return len(self.ids) - len(self.targets)


async def measure_quality(checkpoint: Checkpoint, n_tokens: int, threads: int) -> dict[str, Any]:
    """Score `n_tokens` tokens in every mode, all of them open side by side."""
    todo = windows(Tokenizer(checkpoint.folder), n_tokens, min(WINDOW, checkpoint.config.context))
    few = Window(todo[0].ids[: todo[0].context + ONE_BY_ONE], todo[0].targets[:ONE_BY_ONE])
    total = len(MODES) * len(few.ids) + len([*MODES, *WIRE]) * sum(len(window.ids) for window in todo)
    async with contextlib.AsyncExitStack() as stack:
        pipelines = await open_halves(checkpoint, threads)
        stack.push_async_callback(pipelines["none"].close)
        for mode in MODES[1:]:
            pipelines[mode] = await open_local(checkpoint, mode, threads)
            stack.push_async_callback(pipelines[mode].close)
        bar: tqdm[Any]
        with tqdm(total=total, desc="quality", unit="token", delay=2, leave=False) as bar:
            prompts = [await score(pipelines, window, bar) for window in todo]
            alone = {mode: pipelines[mode] for mode in MODES}
            singles = await score(alone, few, bar, one_by_one=True)
    as_prompt = {mode: torch.cat([scores[mode] for scores in prompts]) for mode in pipelines}
    flattered = checkpoint.name == NAME and cache_directory().resolve() in checkpoint.folder.resolve().parents
    figures = []
    for mode in MODES:
        note = ONCE_INT4 if mode == "int4" and flattered else ""
        figures += [
            summary(mode, "prompt", as_prompt[mode], note),
            summary(mode, f"prompt, first {ONE_BY_ONE}", as_prompt[mode][:ONE_BY_ONE]),
            summary(mode, "one by one, the same", singles[mode]),
        ]
    figures += [summary(mode, "prompt", as_prompt[mode]) for mode in WIRE]
    return {
        "text": f"docstrings of Python {platform.python_version()}'s standard library",
        "window": WINDOW,
        "unscored_context": CONTEXT,
        "reference": "float32, none, run as a prompt",
        "reference_perplexity": as_prompt["none"][:, 1].mean().exp().item(),
        "figures": [asdict(figure) for figure in figures],
    }


def on_cpu(checkpoint: Checkpoint, mode: Quantization, threads: int) -> tuple[DeviceThread, int]:
    """This CPU, in float32 but for the weights, and the context of a session."""
    thread = DeviceThread(Placement(torch.device("cpu"), torch.float32, mode), threads)
    return thread, min(WINDOW, checkpoint.config.context)


class Travelling:
    """A stage whose hidden states come and go as a worker's do, in one of the wire's dtypes."""

    def __init__(self, stage: LocalStage, dtype: str) -> None:
        self._stage, self._dtype = stage, dtype
        self.node, self.blocks, self.device, self.dtype = stage.node, stage.blocks, stage.device, stage.dtype
        self.weights, self.stats, self.forget = stage.weights, stage.stats, stage.forget

    async def forward(self, batch: Batch) -> Computed:
        """Through the wire's encoding, the blocks, and the encoding again."""
        computed = await self._stage.forward(Batch(self._travel(batch.hidden), batch.segments))
        return computed._replace(hidden=self._travel(computed.hidden))

    def _travel(self, hidden: Tensor) -> Tensor:
        wire = to_wire(hidden, self._dtype)
        return from_wire(WireTensor(wire.dtype, wire.shape, bytearray(wire.data))).to(hidden.dtype)


async def open_halves(checkpoint: Checkpoint, threads: int) -> dict[str, Pipeline]:
    """The model in two halves, `none` as one machine runs it, and for each of `WIRE`; all share the weights.

    They share sessions too: a window begins at position 0, so that it finds nothing of another pipeline's.
    """
    thread, context = on_cpu(checkpoint, "none", threads)
    config, middle = checkpoint.config, checkpoint.config.n_blocks // 2
    stages = []
    for span in (range(middle), range(middle, config.n_blocks)):
        stages.append(LocalStage("half", span, config, context, thread))
        await thread.run(stages[-1].load, checkpoint)
    ends = await thread.run(load_ends, checkpoint, config, thread.placement)
    pipelines = {"none": Pipeline(config, fixed(stages), *ends, thread, context)}
    for mode, dtype in WIRE.items():
        over = [Travelling(stage, dtype) for stage in stages]
        pipelines[mode] = Pipeline(config, fixed(over), *ends, thread, context)
    return pipelines


def fixed(stages: Sequence[LocalStage | Travelling]) -> Routes:
    """The one route along these stages."""
    return Routes(stages[-1].blocks.stop, stages, Crew([], Patience()))


async def open_local(checkpoint: Checkpoint, mode: Quantization, threads: int) -> Pipeline:
    """The whole model in one piece."""
    thread, context = on_cpu(checkpoint, mode, threads)
    return await open_pipeline(checkpoint, Topology({}), thread, context, Patience())


# The text.


def windows(tokenizer: Tokenizer, n_tokens: int, size: int) -> list[Window]:
    """Windows of at most `size` tokens that score `n_tokens` in all; each begins as the model wants."""
    start, ids = tokenizer.encode(""), []
    for text in documentation():
        ids += tokenizer.encode(text, start=False)
        if len(ids) > n_tokens + CONTEXT:
            break
    else:
        raise click.ClickException(f"--quality-tokens: the text has only {len(ids) - CONTEXT - 1} tokens")
    step = size - len(start) - CONTEXT
    found = []
    for first in range(0, n_tokens, step):
        end = CONTEXT + min(first + step, n_tokens)
        targets = torch.tensor(ids[first + CONTEXT + 1 : end + 1])
        found.append(Window(start + ids[first:end], targets))
    return found


def documentation() -> Iterator[str]:
    """The docstrings of `MODULES`, a module at a time, read without importing them."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in MODULES.split():
        folder = library / name
        files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
        for file in files:
            if file.is_file():
                nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
                texts = [ast.get_docstring(node) for node in nodes if isinstance(node, DOCUMENTED)]
                yield "".join(f"{text}\n\n" for text in texts if text)


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


# The scores: of each token its KL divergence, the reference's and the mode's surprise, and whether the
# top token is the same, `[n_tokens, 4]`.


async def score(
    pipelines: Mapping[str, Pipeline], window: Window, bar: "tqdm[Any]", one_by_one: bool = False
) -> dict[str, Tensor]:
    """Scores of a window in every mode; the reference is `none` as a prompt, whatever the modes run as."""
    reference = await run(pipelines["none"], window, False)
    hidden = {}
    for mode, pipeline in pipelines.items():
        same = mode == "none" and not one_by_one
        hidden[mode] = reference if same else await run(pipeline, window, one_by_one)
        bar.update(len(window.ids))
    found: dict[str, list[Tensor]] = {mode: [] for mode in pipelines}
    for start in range(0, len(window.targets), ROWS):
        rows = slice(start, start + ROWS)
        expected = await log_probabilities(pipelines["none"], reference[rows], False)
        for mode, pipeline in pipelines.items():
            got = expected
            if hidden[mode] is not reference:
                got = await log_probabilities(pipeline, hidden[mode][rows], one_by_one)
            found[mode].append(compare(expected, got, window.targets[rows]))
    return {mode: torch.cat(parts) for mode, parts in found.items()}


async def run(pipeline: Pipeline, window: Window, one_by_one: bool) -> Tensor:
    """Hidden states of the tokens that are scored; all at once, or one by one after the context."""
    if not one_by_one:
        return (await forward(pipeline, 0, window.ids))[window.context :]
    await forward(pipeline, 0, window.ids[: window.context])
    positions = range(window.context, len(window.ids))
    return torch.cat([await forward(pipeline, i, window.ids[i : i + 1]) for i in positions])


async def forward(pipeline: Pipeline, position: int, ids: list[int]) -> Tensor:
    """Run ids from `position` on; at 0 the session is a new one, since what lies beyond is forgotten."""
    return await pipeline.forward(ids, [Segment(0, position, len(ids))])


async def log_probabilities(pipeline: Pipeline, hidden: Tensor, one_by_one: bool) -> Tensor:
    """Of the next token, `[n, vocab_size]`; float64, since small divergences are differences of them."""
    parts = torch.split(hidden, 1 if one_by_one else ROWS)
    logits = torch.cat([await pipeline.choose(part, lambda logits: logits) for part in parts])
    return logits.double().log_softmax(1)


def compare(expected: Tensor, got: Tensor, targets: Tensor) -> Tensor:
    """Scores, from log-probabilities `[n, vocab_size]` and the tokens that follow `[n]`."""
    divergence = (expected.exp() * (expected - got)).sum(1)
    surprises = [-each.gather(1, targets[:, None])[:, 0] for each in (expected, got)]
    same_top = expected.argmax(1) == got.argmax(1)
    return torch.stack([divergence, *surprises, same_top.double()], 1)


def summary(mode: str, run_as: str, scores: Tensor, note: str = "") -> Quality:
    """Averages of scores."""
    divergence, expected, got, same_top = scores.mean(0).tolist()
    worse = torch.tensor(got - expected, dtype=torch.float64).expm1().item()
    return Quality(mode, run_as, len(scores), divergence, 100 * worse, 100 * same_top, note)


def quality_lines(result: dict[str, Any]) -> list[str]:
    """The result for a person."""
    rows = [["", "run as", "tokens", "KL divergence", "perplexity", "same top token", ""]]
    rows += [
        [
            figure["mode"],
            figure["run_as"],
            str(figure["tokens"]),
            f"{figure['kl_nats']:.2g} nats",
            f"{figure['perplexity_percent']:+.2f} %",
            f"{figure['same_top_percent']:.2f} %",
            figure["note"],
        ]
        for figure in result["figures"]
    ]
    return [
        f"quality beside {result['reference']}, whose perplexity is {result['reference_perplexity']:.2f}; "
        f"{result['text']},",
        f"in windows of {result['window']} tokens, the first {result['unscored_context']} not scored:",
        *columns(rows),
    ]
