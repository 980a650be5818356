"""What a run reports: the topology table, the closing lines, the JSON object."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from cake.errors import CakeError
from cake.generator import FinishReason
from cake.memory import peak_memory_bytes
from cake.pipeline import Pipeline
from cake.protocol.handshake import describe_spans
from cake.stage import Stage
from cake.text import columns, human_bytes
from cake.topology import MASTER, Topology


@dataclass
class Answer:
    """One answer and its times, in seconds since its prompt was handed in."""

    prompt_tokens: int
    prompt_run: int = 0  # the rest was still in the stages' caches
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | Literal["error"] | None = None  # none while it goes on, or if interrupted
    error: str = ""  # the line that says why it ended before its time
    proposed: int = 0  # tokens, by who guesses ahead
    accepted: int = 0
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens that were run, per second until the first token was there."""
        return self.prompt_run / self.first_token_s if self.first_token_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens per second after the first."""
        seconds = self.last_token_s - self.first_token_s
        return (len(self.token_ids) - 1) / seconds if seconds > 0 else 0.0

    @contextlib.contextmanager
    def told_of_errors(self) -> Iterator[None]:
        """Whatever error comes is what it ends with; it goes on to whoever can do something about it."""
        try:
            yield
        except CakeError as error:
            self.finish_reason, self.error = "error", str(error)
            raise


def as_json(answer: Answer, pipeline: Pipeline) -> dict[str, Any]:
    """The object that `--json` prints; it has an `error` only if there was one."""
    told = {
        "text": answer.text,
        "prompt_tokens": answer.prompt_tokens,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "time_to_first_token_s": round(answer.first_token_s, 6),
        "prefill_tokens_per_s": round(answer.prefill_tokens_per_s, 3),
        "decode_tokens_per_s": round(answer.decode_tokens_per_s, 3),
        "proposed_tokens": answer.proposed,
        "accepted_tokens": answer.accepted,
        "peak_memory_bytes": peak_memory_bytes(),
        "stages": [_stage_json(stage) for stage in pipeline.stages],
    }
    return {**told, "error": answer.error} if answer.error else told


def _stage_json(stage: Stage) -> dict[str, Any]:
    return {
        "node": stage.node,
        "first_block": stage.blocks[0],
        "last_block": stage.blocks[-1],
        "device": stage.device,
        "dtype": stage.dtype,
        "weights": stage.weights,
        "messages": stage.stats.messages,
        "bytes_sent": stage.stats.bytes_sent,
        "bytes_received": stage.stats.bytes_received,
        "compute_s": round(stage.stats.compute_s, 6),
        "network_s": round(stage.stats.network_s, 6),
    }


def closing_lines(answer: Answer, pipeline: Pipeline) -> str:
    """A line on the answer, and a line on each stage's share of it."""
    kept = answer.prompt_tokens - answer.prompt_run
    generation = (
        f" · generation at {answer.decode_tokens_per_s:.1f} tokens/s" if len(answer.token_ids) > 1 else ""
    )
    proposals = f" · {answer.accepted} of {answer.proposed} proposed tokens accepted"
    summary = (
        f"{len(answer.token_ids)} tokens ({answer.finish_reason or 'interrupted'})"
        f" · first after {answer.first_token_s:.2f} s"
        f" · prompt of {answer.prompt_tokens}{f' ({kept} kept)' if kept else ''}"
        f" at {answer.prefill_tokens_per_s:.1f} tokens/s"
        f"{generation}{proposals if answer.proposed else ''}"
        f" · memory {human_bytes(peak_memory_bytes())}"
    )
    rows = [
        [
            f"  {stage.node}",
            f"blocks {describe_spans([stage.blocks])}",
            f"{stage.stats.messages} messages",
            f"compute {stage.stats.compute_s:.2f} s",
            f"network {stage.stats.network_s:.2f} s",
            f"sent {human_bytes(stage.stats.bytes_sent)}",
            f"received {human_bytes(stage.stats.bytes_received)}",
        ]
        for stage in pipeline.stages
    ]
    return "\n".join([summary, *columns(rows)])


def topology_table(name: str, topology: Topology, pipeline: Pipeline) -> str:
    """Who runs what, a row for each stage in the order in which a token passes them."""
    config = pipeline.config
    title = f"{name}: {config.n_blocks} blocks, hidden size {config.hidden_size}"
    rows = [["node", "blocks", "device", "dtype", "weights", "address", "description"]]
    rows.append([MASTER, "embedding", "", "", "", "", ""])
    for stage in pipeline.stages:
        node = topology.nodes.get(stage.node)
        where = [node.address, node.description] if node else ["", ""]
        numbers = [stage.device, stage.dtype, stage.weights]
        rows.append([stage.node, describe_spans([stage.blocks]), *numbers, *where])
    rows.append([MASTER, "norm, head", "", "", "", "", ""])
    return "\n".join([title, *("  " + line for line in columns(rows))])
