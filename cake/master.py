"""The master: open a pipeline, run a prompt or a chat, report."""

import asyncio
import json
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from cake.budget import CacheBudget
from cake.device import DeviceThread, choose_context, choose_placement
from cake.dialling import Patience
from cake.draft import DraftModel, open_draft_checkpoint
from cake.errors import CakeError
from cake.generator import Generator, check_prompt
from cake.model.sampling import SamplingParams
from cake.model.tokenizer import Tokenizer
from cake.net.tls import new_credentials
from cake.options import MasterOptions, SamplingOptions
from cake.pipeline import OnBytes, open_pipeline
from cake.progress import loading_bar, prompt_bar
from cake.report import Answer, as_json, closing_lines, topology_table
from cake.routes import Recovery
from cake.session import Session
from cake.speculation import NGrams, Proposer
from cake.terminal import end_text, show_text, tell
from cake.topology import Topology, load_topology
from cake.trace import check_writable, start_tracing, write_trace
from cake.weights.checkpoint import Checkpoint, block_of, bundled_topology, open_checkpoint


def run_master(options: MasterOptions) -> None:
    """Do what the options say; the text goes to stdout, everything else to stderr."""
    topology_file = options.topology or bundled_topology(options.compute.model)
    topology = load_topology(topology_file) if topology_file else Topology({})
    wanted = every if options.adopt else wanted_by_master(topology)
    checkpoint = open_checkpoint(options.compute.model, wanted)
    master = Master(options, topology, checkpoint, Tokenizer(checkpoint.folder))
    asyncio.run(_run(master))


async def _run(master: "Master") -> None:
    chat, api = master.options.chat, master.options.api
    once = not (chat or api)
    prompt = master.encode(master.options.prompt) if once else []
    if once:
        master.check(prompt)  # before anything is loaded for it
    listening = _listen(api) if api else None
    trace = master.options.trace
    if trace:
        check_writable(trace)
    generator = await master.open(Patience(dead_after=master.options.dead_after))
    if trace:
        start_tracing(generator.pipeline.stages)
    try:
        if chat:
            from cake.chat import run_chat

            await run_chat(master, generator)
        elif listening:
            await _serve(master, generator, listening)
        else:
            await master.answer_once(generator, prompt)
    finally:
        await generator.pipeline.close()
        if trace:
            write_trace(generator.pipeline.stages, trace)


def _listen(address: str) -> socket.socket:
    """Before anything is loaded: the address may be taken. Clients that come early wait."""
    try:
        from cake.api.server import listen_at
    except ImportError as error:
        raise CakeError(f"--api needs more packages: pip install 'cake[api]' ({error})") from error
    return listen_at(address)


async def _serve(master: "Master", generator: Generator, listening: socket.socket) -> None:
    from cake.api.app import build_app
    from cake.api.origins import Origins
    from cake.api.server import names_of, serve, url_of, warn_of_strangers
    from cake.api.service import Service
    from cake.cluster_view import ClusterView

    api_key = master.options.api_key
    warn_of_strangers(listening, api_key)
    origins = Origins(master.options.api_origins, names_of(listening, api_key))
    service = Service(generator, master.model_name, master.sampling)
    tell(f"answering {service.model} at {url_of(listening)}/v1; Ctrl-C ends it")
    view = ClusterView(generator, master.model_name)
    async with view.watched():
        await serve(build_app(service, view, api_key, origins), listening, view.close)


def every(name: str) -> bool:
    """All tensors: whose blocks may come to run here is not known."""
    return True


def wanted_by_master(topology: Topology) -> Callable[[str], bool]:
    """Which tensors the master needs: all but those of blocks that a node serves."""
    served = {block for node in topology.nodes.values() for span in node.spans for block in span}
    return lambda name: block_of(name) not in served


class Master:
    """One run's parts: its options, model and tokenizer."""

    def __init__(
        self,
        options: MasterOptions,
        topology: Topology,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
    ) -> None:
        self.options, self.tokenizer = options, tokenizer
        self.raw = options.raw or not tokenizer.has_chat_template
        self.sampling = sampling_params(options.sampling, checkpoint.generation_config)
        self._topology, self._checkpoint = topology, checkpoint
        name = options.draft_model  # refused at once, if it is no draft for this model
        self._credentials = None if options.cluster_key is None else new_credentials(options.cluster_key)
        self._draft = open_draft_checkpoint(name, checkpoint, tokenizer) if name else None

    @property
    def model_name(self) -> str:
        """What the model is called."""
        return self._checkpoint.name

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a single prompt, through the chat template unless the run is raw."""
        if self.raw:
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode_chat([*self.system_messages(), message("user", prompt)])

    def system_messages(self) -> list[dict[str, str]]:
        """The chat's beginning; empty when there is no system prompt."""
        words = self.options.system_prompt
        return [message("system", words)] if words else []

    def check(self, prompt: list[int]) -> None:
        """Raise `CakeError` unless the prompt fits the model and the context."""
        config = self._checkpoint.config
        check_prompt(prompt, choose_context(self.options.compute.context, config.context), config.vocab_size)

    async def open(self, patience: Patience) -> Generator:
        """Connect, load, and show the table."""
        compute, checkpoint = self.options.compute, self._checkpoint
        checkpoint.find("model.norm.weight")  # which a worker's bundle lacks: nobody is waited for then
        placement = choose_placement(compute, checkpoint.config.dtype)
        context = choose_context(compute.context, checkpoint.config.context)
        thread = DeviceThread(placement, compute.threads)
        budget = CacheBudget(placement.device, compute.cache_memory)
        layout = self._topology.layout(checkpoint.config.n_blocks)
        blocks = [block for node, span in layout if node is None for block in span]
        total = sum(map(checkpoint.bytes_of, [*blocks, None]))
        if self._draft:
            total += sum(map(self._draft.bytes_of, [*range(self._draft.config.n_blocks), None]))
        with loading_bar(total) as bar:
            try:
                new_proposer = await self._proposers(thread, context, bar.update, budget)
                pipeline = await open_pipeline(
                    checkpoint,
                    self._topology,
                    thread,
                    context,
                    patience,
                    bar.update,
                    self.options.wire_dtype,
                    Recovery(self.options.rejoin_timeout, self.options.adopt),
                    self._credentials,
                    budget,
                )
            except BaseException:
                thread.close()
                raise
        tell(topology_table(checkpoint.name, self._topology, pipeline))
        return Generator(pipeline, self.tokenizer, checkpoint.stop_ids, new_proposer=new_proposer)

    async def _proposers(
        self, thread: DeviceThread, context: int, on_bytes: OnBytes, budget: CacheBudget
    ) -> Callable[[], Proposer] | None:
        """What makes the one who guesses for a session; none where nobody does."""
        if self._draft:
            return (await DraftModel.load(self._draft, thread, context, on_bytes, budget)).proposer
        return NGrams if self.options.speculate == "ngram" else None

    async def answer_once(self, generator: Generator, prompt: list[int]) -> None:
        """Answer and report, as text or as JSON; even if there is an error, of what was said before."""
        as_text = not self.options.as_json
        answer = Answer(len(prompt))
        try:
            await self.answer(generator, Session(), prompt, show_text if as_text else _hide, answer)
        finally:
            if answer.token_ids and as_text:
                end_text()
            if answer.finish_reason and not as_text:
                print(json.dumps(as_json(answer, generator.pipeline), ensure_ascii=False), flush=True)
            elif answer.finish_reason and answer.token_ids:
                tell(closing_lines(answer, generator.pipeline))

    async def answer(
        self,
        generator: Generator,
        session: Session,
        prompt: list[int],
        show: Callable[[str], None],
        answer: Answer,
    ) -> None:
        """Generate, showing each piece and writing it into `answer` as it comes, and the error at the end."""
        started = time.perf_counter()
        limit = self.options.max_tokens
        with answer.told_of_errors(), prompt_bar(len(prompt)) as bar:

            def count(n_tokens: int) -> None:
                answer.prompt_run += n_tokens
                bar.update(n_tokens)

            pieces = generator.generate(session, prompt, self.sampling, limit, count)
            async for piece in pieces:
                answer.last_token_s = time.perf_counter() - started
                if not answer.token_ids:
                    bar.close()
                    answer.first_token_s = answer.last_token_s
                answer.token_ids.append(piece.token)
                answer.text += piece.text
                answer.finish_reason = piece.finish_reason
                answer.proposed += piece.proposed
                answer.accepted += piece.accepted
                show(piece.text)


def sampling_params(chosen: SamplingOptions, model: Mapping[str, Any]) -> SamplingParams:
    """The person's choice, else the model's `generation_config.json`, else the defaults."""
    defaults = SamplingParams()
    greedy = model.get("do_sample") is False

    def of_model(name: str) -> Any:
        value: Any = model.get(name)
        return value if type(value) in (int, float) and value >= 0 else None

    return SamplingParams(
        temperature=_first(
            chosen.temperature, 0.0 if greedy else of_model("temperature"), defaults.temperature
        ),
        top_p=_first(chosen.top_p, of_model("top_p"), defaults.top_p),
        top_k=_first(chosen.top_k, of_model("top_k"), defaults.top_k),
        repeat_penalty=_first(
            chosen.repeat_penalty, of_model("repetition_penalty") or None, defaults.repeat_penalty
        ),
        repeat_last_n=chosen.repeat_last_n,
        seed=chosen.seed,
    )


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def message(role: str, content: str) -> dict[str, str]:
    """One message of a chat, as chat templates want it."""
    return {"role": role, "content": content}


def _hide(text: str) -> None:
    """Where JSON is printed in the end."""
