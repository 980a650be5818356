"""What the command line gave: checked for what contradicts itself, and made into options."""

from collections.abc import Mapping
from typing import Any

import click
from click.core import ParameterSource

from cake.errors import CakeError
from cake.options import ComputeOptions, MasterOptions, SamplingOptions, WorkerOptions

Given = Mapping[str, Any]
OF_ONE_PROMPT = {
    "chat": "--chat",
    "as_json": "--json",
    "raw": "--raw",
    "prompt": "--prompt",
    "system_prompt": "--system-prompt",
    "sample_len": "--sample-len",
}
OF_WORKER = {"name": "--name", "address": "--address", "allow": "--allow", "drain": "--drain"}
OF_API = {"api_key": "--api-key", "api_origin": "--api-origin"}


def refuse_contradictions(mode: str, given: Given) -> None:
    """Raise `CakeError` where options contradict one another, or one that was typed would be ignored."""
    if given["cpu"] and given["device"] not in (None, "cpu"):
        raise CakeError(f"--cpu and --device {given['device']} contradict one another; choose one")
    _refuse_beside_api(mode, given)
    if mode == "worker":
        return
    for name, flag in OF_WORKER.items():
        if _typed(name):
            raise CakeError(f"{flag} is for a worker; start one with --mode worker")
    if given["chat"] and given["as_json"]:
        raise CakeError("--chat and --json do not go together; choose one")
    if given["chat"] and _typed("prompt"):
        raise CakeError("--chat and --prompt do not go together: a chat asks for each line")
    if given["speculate"] != "none" and given["draft_model"]:
        raise CakeError(f"--speculate {given['speculate']} and --draft-model both guess; choose one")


def _refuse_beside_api(mode: str, given: Given) -> None:
    if given["api"] is None:
        for name, flag in OF_API.items():
            if _typed(name):
                raise CakeError(f"{flag} is for --api, which is not there")
        return
    if mode == "worker":
        raise CakeError("--api is for a master; a worker answers no requests of its own")
    for name, flag in OF_ONE_PROMPT.items():
        if _typed(name):
            raise CakeError(f"--api and {flag} do not go together: each request says what it wants")


def _typed(name: str) -> bool:
    return click.get_current_context().get_parameter_source(name) == ParameterSource.COMMANDLINE


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


def worker_options(given: Given) -> WorkerOptions:
    """Of a worker. Raises `CakeError` where `--allow` names no networks."""
    from cake.net.admission import parse_networks

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
    """Of a master. Raises `CakeError` where `--api-origin` is no origin."""
    from cake.api.origins import read_origins

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
