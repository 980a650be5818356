"""Where a worker listens, and why it cannot."""

import contextlib
import socket

import pytest

from cake.errors import NodeError
from cake.net.listener import bind
from cake.visit import Service
from cake.worker import Worker


def test_an_address_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(NodeError, match=f"^--address 127.0.0.1:{port} is in use; stop the other program"):
            bind("127.0.0.1", port)


async def test_an_address_that_another_worker_has_bound_but_does_not_listen_on_yet() -> None:
    """It loads its weights meanwhile: two workers started together with the same address."""
    service = Service("porch", "m", 64, 512, {}, [])
    workers = [Worker(service), Worker(service)]
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(bind("127.0.0.1", 0))
        with pytest.raises(NodeError, match="is in use"):
            second = stack.enter_context(bind(*first.getsockname()))
            for worker, listener in zip(workers, (first, second), strict=True):
                await worker.start(listener)
        for worker in workers:
            await worker.close("the test is over")


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.168..1.20", "192.0.2.1"])
def test_an_address_that_is_not_here(host: str) -> None:
    with pytest.raises(NodeError, match=f"^--address {host}:10128 cannot be used: "):
        bind(host, 10128)
