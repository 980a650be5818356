"""What the command line gave: checked for what contradicts itself, and made into options."""

from collections.abc import Mapping, Sequence
from typing import Any

import click
from click.core import ParameterSource

from cake.errors import CakeError
from cake.options import ComputeOptions, MasterOptions, SamplingOptions, WorkerOptions
from cake.topology import parse_address

Given = Mapping[str, Any]

# Who reads what: each option of `cake-cli` stands in one of these, by the name of its parameter.
OF_COMPUTING = ("model", "dtype", "quantize", "device", "cpu", "threads", "context", "cache_memory")
OF_BOTH = ("mode", "debug", "topology", "cluster_key", "dead_after", *OF_COMPUTING)
OF_WORKER = ("name", "address", "allow", "drain")
OF_SAMPLING = ("temperature", "top_p", "top_k", "repeat_penalty", "repeat_last_n", "seed")
OF_ANY_MASTER = (*OF_SAMPLING, "speculate", "draft_model", "trace", "api")
OF_TERMINAL = ("prompt", "chat", "as_json", "raw", "system_prompt", "sample_len")  # a master without --api
OF_API = ("api_key", "api_origin")
OF_CLUSTER = ("wire_dtype", "rejoin_timeout", "adopt")  # a master that has workers
OF_MASTER = (*OF_ANY_MASTER, *OF_TERMINAL, *OF_API, *OF_CLUSTER)

NEVER_EMPTY = ("model", "draft_model", "device", "name", "api_key")


def refuse_contradictions(mode: str, given: Given) -> None:
    """Raise `CakeError` where options contradict one another, or one that was typed would be ignored."""
    for flag in _typed([name for name in NEVER_EMPTY if given[name] == ""]):
        raise CakeError(f"{flag} is empty; give it a value, or leave it out")
    if given["cpu"] and given["device"] not in (None, "cpu"):
        raise CakeError(f"--cpu and --device {given['device']} contradict one another; choose one")
    if mode == "worker":
        for flag in _typed(OF_MASTER):
            raise CakeError(f"{flag} is for a master; give it there, or leave out --mode worker")
        return
    for flag in _typed(OF_WORKER):
        raise CakeError(f"{flag} is for a worker; start one with --mode worker")
    _refuse_beside_api(given)
    _refuse_without_workers(given)
    if given["chat"] and given["as_json"]:
        raise CakeError("--chat and --json do not go together; choose one")
    if given["chat"] and _typed(["prompt"]):
        raise CakeError("--chat and --prompt do not go together: a chat asks for each line")
    if given["raw"] and _typed(["system_prompt"]):
        raise CakeError("--raw and --system-prompt do not go together: a raw text has no system's words")
    if given["speculate"] != "none" and given["draft_model"]:
        raise CakeError(f"--speculate {given['speculate']} and --draft-model both guess; choose one")


def _refuse_beside_api(given: Given) -> None:
    if given["api"] is None:
        for flag in _typed(OF_API):
            raise CakeError(f"{flag} is for --api, which is not there")
        return
    for flag in _typed(OF_TERMINAL):
        raise CakeError(f"--api and {flag} do not go together: each request says what it wants")


def _refuse_without_workers(given: Given) -> None:
    """Who has no topology has no workers; a bundle has one."""
    typed = _typed((*OF_CLUSTER, "cluster_key", "dead_after"))
    if given["topology"] is not None or not typed:
        return
    from cake.weights.checkpoint import bundled_topology

    if bundled_topology(given["model"]) is None:
        raise CakeError(f"{typed[0]} is for a master with workers; --topology says which they are")


def _typed(names: Sequence[str]) -> list[str]:
    """The flags of those parameters that were given on the command line."""
    context = click.get_current_context()
    flag_of = {parameter.name: parameter.opts[-1] for parameter in context.command.params}
    return [
        flag_of[name] for name in names if context.get_parameter_source(name) == ParameterSource.COMMANDLINE
    ]


def _compute_options(given: Given) -> ComputeOptions:
    return ComputeOptions(
        model=given["model"],
        dtype=given["dtype"],
        quantize=given["quantize"],
        device="cpu" if given["cpu"] else given["device"],
        threads=given["threads"],
        context=given["context"],
        cache_memory=given["cache_memory"],
    )


def _check_address(flag: str, text: str, example: str) -> None:
    try:
        parse_address(text, example)
    except ValueError as error:
        raise CakeError(f"{flag}: {error}") from error


def worker_options(given: Given) -> WorkerOptions:
    """Of a worker. Raises `CakeError` where `--address` is none, or `--allow` names no networks."""
    from cake.net.admission import parse_networks

    _check_address("--address", given["address"], "0.0.0.0:10128")
    return WorkerOptions(
        compute=_compute_options(given),
        topology=given["topology"],
        name=given["name"],
        address=given["address"],
        allow=parse_networks(given["allow"]),
        cluster_key=given["cluster_key"],
        dead_after=given["dead_after"],
        drain=given["drain"],
    )


def master_options(given: Given) -> MasterOptions:
    """Of a master. Raises `CakeError` where `--api` is no address, or `--api-origin` no origin."""
    from cake.api.origins import read_origins

    if given["api"] is not None:
        _check_address("--api", given["api"], "127.0.0.1:8080")
    sampling = SamplingOptions(
        temperature=given["temperature"],
        top_p=given["top_p"],
        top_k=given["top_k"],
        repeat_penalty=given["repeat_penalty"],
        repeat_last_n=given["repeat_last_n"],
        seed=given["seed"],
    )
    return MasterOptions(
        compute=_compute_options(given),
        sampling=sampling,
        topology=given["topology"],
        prompt=given["prompt"],
        system_prompt=given["system_prompt"],
        raw=given["raw"],
        chat=given["chat"],
        max_tokens=given["sample_len"],
        speculate=given["speculate"],
        draft_model=given["draft_model"],
        as_json=given["as_json"],
        wire_dtype=given["wire_dtype"],
        trace=given["trace"],
        dead_after=given["dead_after"],
        rejoin_timeout=given["rejoin_timeout"],
        adopt=given["adopt"],
        api=given["api"],
        api_origins=read_origins(given["api_origin"]),
        cluster_key=given["cluster_key"],
        api_key=given["api_key"],
    )
