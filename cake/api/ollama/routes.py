"""Ollama's routes over a service."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cake.api.answering import answered
from cake.api.errors import ApiError
from cake.api.handlers import About, Dialect, Endpoint, posted
from cake.api.ollama.answers import (
    ApiVersion,
    AvailableModels,
    ChatAnswer,
    ChatLoaded,
    ChatPiece,
    GenerateAnswer,
    GenerateLoaded,
    GeneratePiece,
    ModelDescribed,
    OllamaError,
    RunningModels,
)
from cake.api.ollama.models import LATEST, VERSION, Listed
from cake.api.ollama.replies import ChatReply, TextReply, error_body
from cake.api.ollama.requests import ChatRequest, Generated, GenerateRequest, ShowRequest
from cake.api.service import Service
from cake.api.task import Task


def _about(summary: str, answer: Any, line: Any = None) -> About:
    return About(summary, answer, line=line, error=OllamaError, group="Ollama")


CHAT = _about("Answer a chat.", ChatAnswer | ChatLoaded, ChatPiece | ChatAnswer | OllamaError)
GENERATE = _about(
    "Answer a prompt.", GenerateAnswer | GenerateLoaded, GeneratePiece | GenerateAnswer | OllamaError
)
SHOW = _about("What the model is.", ModelDescribed)
TAGS = _about("Which models are served.", AvailableModels)
RUNNING = _about("Which of them are loaded.", RunningModels)
VERSION_OF = _about("Whose API this is.", ApiVersion)


def ollama_dialect(service: Service) -> Dialect:
    """What clients of Ollama's API ask for."""
    listed = Listed(service)

    async def chat(request: Request, body: ChatRequest) -> Response:
        _check(service, body)
        reply, offer = ChatReply(body.model), body.offer
        if not body.messages:
            return JSONResponse(reply.loaded)
        messages = [message.for_template for message in body.messages]
        task = await service.chat(body.asked, messages, offer)
        return await answered(request, service, task, reply, body.stream)

    async def generate(request: Request, body: GenerateRequest) -> Response:
        _check(service, body)
        reply = TextReply(body.model)
        if not body.prompt:
            return JSONResponse(reply.loaded)
        task = await _generated(service, body)
        return await answered(request, service, task, reply, body.stream)

    async def show(request: Request, body: ShowRequest) -> Response:
        service.check_model(_named(body.model or body.name))
        return JSONResponse(listed.described)

    async def tags(request: Request) -> Response:
        return JSONResponse(listed.available)

    async def running(request: Request) -> Response:
        return JSONResponse(listed.running)

    async def version(request: Request) -> Response:
        told: ApiVersion = {"version": VERSION}
        return JSONResponse(told)

    endpoints = [
        posted("/api/chat", ChatRequest, chat, CHAT),
        posted("/api/generate", GenerateRequest, generate, GENERATE),
        posted("/api/show", ShowRequest, show, SHOW),
        Endpoint("/api/tags", tags, about=TAGS),
        Endpoint("/api/ps", running, about=RUNNING),
        Endpoint("/api/version", version, about=VERSION_OF),
    ]
    return Dialect(endpoints, error_body, _is_spoken)


async def _generated(service: Service, body: GenerateRequest) -> Task:
    if service.knows_chats and not body.raw:
        return await service.chat(body.asked, body.messages)
    if body.system:
        raise ApiError(400, "system needs the model's chat template, which is not used here")
    return await service.completion(body.asked, body.prompt)


def _check(service: Service, body: Generated) -> None:
    """Raise `ApiError` where another model is wanted, or more context than there is."""
    service.check_model(_named(body.model))
    wanted = body.options.num_ctx or 0
    if wanted > service.context:
        raise ApiError(
            400, f"num_ctx is {wanted}, but the context that is served here holds {service.context} tokens"
        )


def _named(model: str) -> str:
    """The model's own name: there is one version of it."""
    return model.removesuffix(LATEST)


def _is_spoken(request: Request) -> bool:
    path = request.url.path
    return path.startswith("/api/") and not path.startswith("/api/v1/")
