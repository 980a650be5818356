"""Who goes on and who waits where the stages have no room for the caches of all sessions at once.

Sessions that do not fit together would drive one another out at every token, and be computed again from
their beginnings each time. So one that is lost again and again beside others waits until one of them has
nothing to do any more.

Knows jobs, and neither batches nor bytes: that there is no room is seen from what is lost.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from cake.job import Job


class Turns:
    """Lets jobs go on, by calling `go`, as long as none of them has to wait."""

    def __init__(self, go: Callable[[Job], object]) -> None:
        self._go = go
        self._active: set[Job] = set()
        self._waiting: deque[Job] = deque()
        self._most = 0  # jobs that found room at once, when one had to wait

    @property
    def jobs(self) -> tuple[Job, ...]:
        """All that have begun and not ended, those that wait too."""
        return (*self._active, *self._waiting)

    def begin(self, job: Job) -> None:
        """Let it go on, unless others wait already and the stages hold nothing of its session either."""
        job.done.add_done_callback(lambda _: asyncio.get_running_loop().call_soon(self._end, job))
        if self._waiting and not job.session.held:
            self._waiting.append(job)
        else:
            self._active.add(job)
            self._go(job)

    def wait(self, job: Job) -> bool:
        """Hold it back until another ends; whether there is any other."""
        others = self._active - {job}
        if not others:
            return False
        self._active, self._most = others, len(others)
        self._waiting.append(job)
        return True

    def _end(self, job: Job) -> None:
        """A job is done, and whoever waited for it has begun the session's next, if there is one."""
        self._active.discard(job)
        while self._waiting and len(self._active) < self._most:
            following = self._waiting.popleft()
            if not following.done.done():
                self._active.add(following)
                self._let(following)

    def _let(self, job: Job) -> None:
        try:
            self._go(job)
        except Exception as error:  # a mistake of our own: whoever waits for the job is told
            job.done.set_exception(error)
