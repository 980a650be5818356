"""A route: the stages that a session's tokens pass, one after another."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from cake.chain import Chain
from cake.model.batch import Batch
from cake.remote import RemoteStage
from cake.stage import LocalStage

AnyStage = LocalStage | RemoteStage


class Route:
    """Legs that cover every block, one after another."""

    def __init__(self, legs: Sequence[LocalStage | Chain]) -> None:
        self._legs = tuple(legs)
        self.stages = tuple(_stages_of(legs))
        self._until: dict[int, Route] = {}  # the same, but ending earlier

    def until(self, block: int) -> "Route":
        """The stages that begin before `block`."""
        if block not in self._until:
            legs = [_leg_until(leg, block) for leg in self._legs]
            self._until[block] = Route([leg for leg in legs if leg is not None])
        return self._until[block]

    @property
    def alive(self) -> bool:
        """Whether all its workers, and their ways to one another, are there."""
        return all(leg.alive for leg in self._legs if isinstance(leg, Chain))

    @property
    def leaving(self) -> bool:
        """Whether one of its workers will stop soon."""
        return any(is_leaving(stage) for stage in self.stages)

    @property
    def network_s(self) -> float:
        """Seconds that a small batch spends on the network, as measured lately."""
        return sum(leg.network_s for leg in self._legs if isinstance(leg, Chain))

    async def forward(self, batch: Batch) -> Tensor:
        """Run the batch through its blocks; hidden states `[n_tokens, hidden_size]`."""
        for leg in self._legs:
            batch = Batch((await leg.forward(batch)).hidden, batch.segments)
        return batch.hidden


def _leg_until(leg: LocalStage | Chain, block: int) -> LocalStage | Chain | None:
    if isinstance(leg, Chain):
        return leg.until(block)
    return leg if leg.blocks.start < block else None


def is_leaving(stage: AnyStage) -> bool:
    """Whether it is on a worker that will stop soon."""
    return isinstance(stage, RemoteStage) and stage.worker.leaving


def _stages_of(legs: Sequence[LocalStage | Chain]) -> Iterator[AnyStage]:
    for leg in legs:
        if isinstance(leg, Chain):
            yield from leg.stages
        else:
            yield leg
