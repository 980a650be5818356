"""The pipeline: the ordered stages that cover every block, between the embedding and the head.

Built from a topology and a checkpoint; does not know which of its stages are remote once it is open.
"""

import asyncio
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from cake.chain import Chain, link_stages
from cake.device import DeviceThread
from cake.model.batch import Batch, Segment
from cake.model.config import ModelConfig
from cake.model.llama import Embedding, Head, load_ends
from cake.net.tls import Credentials
from cake.protocol.handshake import MAX_BATCH_TOKENS, Expectation
from cake.remote import Patience, RemoteStage, RemoteWorker, connect_worker
from cake.stage import LocalStage
from cake.topology import MASTER, Node, Topology
from cake.weights.checkpoint import Checkpoint

T = TypeVar("T")
OnBytes = Callable[[int], object]


class Pipeline:
    """Token ids in, logits out; hidden states pass through the stages in order."""

    def __init__(
        self,
        config: ModelConfig,
        legs: Sequence[LocalStage | Chain],
        embedding: Embedding,
        head: Head,
        thread: DeviceThread,
        context: int,
        workers: Sequence[RemoteWorker] = (),
    ) -> None:
        self.config, self.context, self._legs = config, context, tuple(legs)
        self.stages = tuple(_stages_of(legs))
        self.workers = tuple(workers)
        self.max_batch_tokens = min(
            [MAX_BATCH_TOKENS, *(worker.welcome.max_batch_tokens for worker in workers)]
        )
        self._embedding, self._head, self._thread = embedding, head, thread

    @property
    def n_stages(self) -> int:
        """Devices that can compute at the same time."""
        return len({stage.node for stage in self.stages})

    async def forward(self, ids: Sequence[int], segments: Sequence[Segment]) -> Tensor:
        """Run tokens `ids`, laid out by `segments`, through all blocks.

        Returns hidden states `[n_tokens, hidden_size]`. Raises `SessionLostError` when a stage
        holds too little of a session: run its earlier tokens again.
        """
        hidden = await self._thread.run(self._embed, ids)
        for leg in self._legs:
            hidden = (await leg.forward(Batch(hidden, tuple(segments)))).hidden
        return hidden

    async def choose(self, hidden: Tensor, choice: Callable[[Tensor], T]) -> T:
        """What `choice` makes of the logits of `hidden` `[n, hidden_size]`.

        Logits are `[n, vocab_size]`, float32 on the CPU; `choice` runs in the device's thread.
        """
        return await self._thread.run(lambda: choice(self._head(hidden).cpu()))

    async def forget(self, session: Hashable) -> None:
        """Free a session in every stage."""
        await asyncio.gather(*(stage.forget([session]) for stage in self.stages))

    async def close(self) -> None:
        """Take leave of the workers and abandon what still runs."""
        self._thread.close()
        await asyncio.gather(*(worker.close() for worker in self.workers))

    def _embed(self, ids: Sequence[int]) -> Tensor:
        return self._embedding(torch.tensor(ids, device=self._thread.placement.device))


async def open_pipeline(
    checkpoint: Checkpoint,
    topology: Topology,
    thread: DeviceThread,
    context: int,
    patience: Patience,
    on_bytes: OnBytes = lambda _: None,
    wire_dtype: str | None = None,
    credentials: Credentials | None = None,
) -> Pipeline:
    """Connect to every node, then load what remains here, so that a bad node is found out first.

    Hidden states travel in `wire_dtype`; without one, as each link allows (see `cake.wire_dtype`).
    The pipeline takes over `thread` and closes it in the end; if this raises, the caller does.
    """
    config = checkpoint.config
    layout = topology.layout(config.n_blocks)
    workers = await _connect_all(checkpoint, topology, patience, credentials)
    try:
        context = min([context, *(worker.welcome.context for worker in workers.values())])
        legs: list[LocalStage | Chain] = []
        for remote, run in itertools.groupby(layout, lambda part: part[0] is not None):
            if remote:
                stages = [RemoteStage(workers[node.name], span) for node, span in run if node]
                legs += await link_stages(stages, wire_dtype)
                continue
            for _, span in run:
                local = LocalStage(MASTER, span, config, context, thread)
                await thread.run(local.load, checkpoint, lambda block: on_bytes(checkpoint.bytes_of(block)))
                legs.append(local)
        embedding, head = await thread.run(load_ends, checkpoint, config, thread.placement)
        on_bytes(checkpoint.bytes_of(None))
    except BaseException:
        await asyncio.gather(*(worker.close() for worker in workers.values()))
        raise
    return Pipeline(config, legs, embedding, head, thread, context, tuple(workers.values()))


async def _connect_all(
    checkpoint: Checkpoint, topology: Topology, patience: Patience, credentials: Credentials | None
) -> dict[str, RemoteWorker]:
    """All nodes at once; the first that fails ends the others' attempts."""
    tasks = {
        node.name: asyncio.create_task(
            connect_worker(node, expectation(checkpoint, node), patience, credentials)
        )
        for node in topology.nodes.values()
    }
    try:
        await asyncio.gather(*tasks.values())
    except BaseException:
        for task in tasks.values():
            task.cancel()
        results = await asyncio.gather(*tasks.values(), return_exceptions=True)
        open_workers = [worker for worker in results if isinstance(worker, RemoteWorker)]
        await asyncio.gather(*(worker.close() for worker in open_workers))
        raise
    return {name: task.result() for name, task in tasks.items()}


def _stages_of(legs: Sequence[LocalStage | Chain]) -> Iterator[LocalStage | RemoteStage]:
    for leg in legs:
        if isinstance(leg, Chain):
            yield from leg.stages
        else:
            yield leg


def expectation(checkpoint: Checkpoint, node: Node) -> Expectation:
    """What a worker that serves `node` must say in its welcome."""
    config = checkpoint.config
    fingerprints = tuple(checkpoint.span_fingerprint(span) for span in node.spans)
    return Expectation(node.name, config.fingerprint, config.hidden_size, node.spans, fingerprints)
