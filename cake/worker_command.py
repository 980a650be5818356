"""`--mode worker`: from options to a worker that serves until it is told to stop."""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import torch

from cake.budget import CacheBudget
from cake.device import DeviceThread, choose_context, choose_placement
from cake.errors import CakeError
from cake.memory import memory_of, peak_memory_bytes, release_code_pages
from cake.net.admission import parse_host
from cake.net.listener import bind
from cake.net.tls import Credentials, new_credentials
from cake.options import WorkerOptions
from cake.progress import loading_bar
from cake.protocol.handshake import describe_spans
from cake.protocol.messages import Memory
from cake.stage import LocalStage
from cake.terminal import note_interrupt
from cake.text import human_bytes
from cake.topology import Node, format_address, load_topology, parse_address
from cake.visit import Service
from cake.weights.checkpoint import Checkpoint, block_of, bundled_topology, open_checkpoint
from cake.worker import Worker

log = logging.getLogger(__name__)


def run_worker(options: WorkerOptions) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    release_code_pages()  # a small span weighs less than what importing torch has left
    credentials = None if options.cluster_key is None else new_credentials(options.cluster_key)
    node = load_topology(_topology_file(options)).node(options.name)
    with bind(*parse_address(options.address)) as listener:
        checkpoint = open_checkpoint(options.compute.model, wanted_by(node))
        _check_blocks(node, checkpoint)
        # Without autograd also in the event loop, which computes a little too.
        with contextlib.suppress(KeyboardInterrupt), torch.inference_mode():
            asyncio.run(_serve(options, node, checkpoint, listener, credentials))
    log.info("%s stopped", node.name)


def _topology_file(options: WorkerOptions) -> Path:
    """The file that was named, or the one in the bundle that was named as the model."""
    path = options.topology or bundled_topology(options.compute.model)
    if path is None:
        model = options.compute.model
        hint = f" ({model} is no bundle that has one)" if model else ""
        raise CakeError(f"a worker needs --topology, the file that says which blocks it serves{hint}")
    return path


def wanted_by(node: Node) -> Callable[[str], bool]:
    """Which tensors a worker needs: those of its blocks."""
    blocks = {block for span in node.spans for block in span}
    return lambda name: block_of(name) in blocks


def _check_blocks(node: Node, checkpoint: Checkpoint) -> None:
    last, n_blocks = node.spans[-1][-1], checkpoint.config.n_blocks
    if last >= n_blocks:
        raise CakeError(
            f"node {node.name!r} claims block {last}, but the model's last block is {n_blocks - 1}"
        )


async def _serve(
    options: WorkerOptions,
    node: Node,
    checkpoint: Checkpoint,
    listener: socket.socket,
    credentials: Credentials | None,
) -> None:
    _cancel_on_signals(signal.SIGINT, signal.SIGTERM)
    placement = choose_placement(options.compute, checkpoint.config.dtype)
    context = choose_context(options.compute.context, checkpoint.config.context)
    thread = DeviceThread(placement, options.compute.threads)
    try:
        budget = CacheBudget(placement.device, options.compute.cache_memory)
        stages = await _load(node, checkpoint, context, thread, budget)
        context = budget.context(context)
        memory = memory_of(placement.device)
        service = _service(node, checkpoint, context, stages, options.dead_after, credentials, memory)
        worker = Worker(service, options.allow)
        gc.freeze()  # what is there by now stays, and need not be looked through again and again
        await worker.start(listener)
        _announce(options, node, checkpoint, service, listener, budget)
        try:
            await _told_to_leave()
            log.info("leaving within %g s; masters may finish, or move, what they have begun", options.drain)
            await worker.drain(options.drain)
        finally:
            thread.close()  # first: what is being computed would hold up everything else
            await worker.close(f"worker {node.name!r} was stopped")
    except asyncio.CancelledError:
        pass  # the way in which a worker ends
    finally:
        thread.close()


def _announce(
    options: WorkerOptions,
    node: Node,
    checkpoint: Checkpoint,
    service: Service,
    listener: socket.socket,
    budget: CacheBudget,
) -> None:
    """Say what is served, and warn of what looks wrong."""
    stage = next(iter(service.stages.values()))
    host, port = listener.getsockname()[:2]
    if service.credentials is None and not _is_loopback(host):
        log.warning(
            "whoever reaches %s may use this worker and read along; to change that, give every node the "
            "same key in CAKE_CLUSTER_KEY",
            format_address(host, port),
        )
    log.info(
        "%s serves blocks %s of %s on %s in %s with %s weights at %s, memory %s, caches of at most %s",
        node.name,
        describe_spans(node.spans),
        checkpoint.name,
        stage.device,
        stage.dtype,
        stage.weights,
        format_address(host, port),
        human_bytes(peak_memory_bytes()),
        human_bytes(budget.limit),
    )
    if port != node.port and parse_address(options.address)[1]:
        log.warning("but the topology sends masters to %s; is --address right?", node.address)


async def _load(
    node: Node, checkpoint: Checkpoint, context: int, thread: DeviceThread, budget: CacheBudget
) -> list[LocalStage]:
    stages = [LocalStage(node.name, span, checkpoint.config, context, thread, budget) for span in node.spans]
    total = sum(checkpoint.bytes_of(block) for span in node.spans for block in span)
    with loading_bar(total) as bar:
        for stage in stages:
            await thread.run(stage.load, checkpoint, lambda block: bar.update(checkpoint.bytes_of(block)))
    return stages


def _service(
    node: Node,
    checkpoint: Checkpoint,
    context: int,
    stages: list[LocalStage],
    dead_after: float,
    credentials: Credentials | None,
    memory: Callable[[], Memory],
) -> Service:
    return Service(
        node=node.name,
        model=checkpoint.config.fingerprint,
        hidden_size=checkpoint.config.hidden_size,
        context=context,
        stages={stage.blocks.start: stage for stage in stages},
        # Every block was just loaded, so every fingerprint is known.
        fingerprints=[checkpoint.span_fingerprint(span) or "" for span in node.spans],
        dead_after=dead_after,
        credentials=credentials,
        memory=memory,
    )


def _is_loopback(host: str) -> bool:
    address = parse_host(host)
    return address is not None and address.is_loopback


def _cancel_on_signals(*numbers: signal.Signals) -> None:
    """These signals cancel the task; where loops know no signals, only Ctrl-C does."""
    task = asyncio.current_task()
    assert task is not None

    def cancel(number: signal.Signals) -> None:
        if number == signal.SIGINT:
            note_interrupt()
        task.cancel()

    with contextlib.suppress(NotImplementedError):
        for number in numbers:
            asyncio.get_running_loop().add_signal_handler(number, cancel, number)


async def _told_to_leave() -> None:
    """Wait for SIGTERM; the next one cancels the task again."""
    told = asyncio.Event()
    with contextlib.suppress(NotImplementedError):
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    await told.wait()
    _cancel_on_signals(signal.SIGTERM)
