"""What happens where memory is short, done to a real worker; `chaos.py` runs this."""

from collections.abc import Sequence

from faults import GREEDY, Ending, Play, node

from cake.generator import Generator
from cake.session import Session

N_CHATS, N_TOKENS = 12, 8
ROOM_FOR_THREE = "36MB"  # a first cache of the demo model in float32 takes 11.8 MB


async def chats_in_turn(play: Play, turns: int = 3) -> Ending:
    """Twelve chats that take turns, on a worker with room for three."""
    right, ample = await _talk(play, turns, [])
    told, tight = await _talk(play, turns, ["--cache-memory", ROOM_FOR_THREE])
    same = sum(a == b for a, b in zip(told, right, strict=True))
    first, most = tight[2], max(tight)
    seen = (
        f"{same} of {N_CHATS} texts identical; {first / 1e6:.0f} MB after three chats, at most "
        f"{most / 1e6:.0f} MB, where without the bound it was {max(ample) / 1e6:.0f} MB"
    )
    return Ending(same == N_CHATS and most <= 1.05 * first, seen)


async def _talk(play: Play, turns: int, options: Sequence[str]) -> tuple[list[list[int]], list[int]]:
    """Every chat's ids in the end, and the worker's memory after each answer."""
    chats = [[100 + i, *play.prompt() * 3] for i in range(N_CHATS)]
    sessions, memory = [Session() for _ in chats], list[int]()
    with play.cast(node("first", 0, 29), options=options) as topology:
        async with play.master(topology) as generator:
            for _ in range(turns):
                for session, ids in zip(sessions, chats, strict=True):
                    ids += await _answer(generator, session, ids)
                    ids += play.prompt()
                    memory.append(play.devices["first"].resident_bytes())
    return chats, memory


async def _answer(generator: Generator, session: Session, ids: list[int]) -> list[int]:
    return [piece.token async for piece in generator.generate(session, ids, GREEDY, N_TOKENS)]
