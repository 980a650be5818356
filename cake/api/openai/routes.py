"""OpenAI's routes over a service."""

from dataclasses import replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cake.api.answering import answered
from cake.api.answers import ErrorAnswer
from cake.api.errors import ApiError
from cake.api.handlers import About, Dialect, Endpoint, posted
from cake.api.openai.answers import (
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionChunk,
    LastChatChunk,
    ModelCard,
    ModelList,
)
from cake.api.openai.events import DONE, Events
from cake.api.openai.requests import ChatRequest, CompletionRequest, Sampled
from cake.api.openai.shapes import ChatShape, CompletionShape, error_body
from cake.api.service import Service
from cake.api.task import Task

CHAT = About("Answer a chat.", ChatCompletion, ChatChunk | LastChatChunk | ErrorAnswer, DONE)
SAME_CHAT = replace(CHAT, summary="The same as `/v1/chat/completions`.")
COMPLETION = About("Go on where a prompt ends.", Completion, CompletionChunk | Completion | ErrorAnswer, DONE)
MODELS = About("Which models are served.", ModelList)
MODEL = About("One of them.", ModelCard, errors=(404,))


def openai_dialect(service: Service) -> Dialect:
    """What clients of OpenAI's API ask for."""

    async def chat(request: Request, body: ChatRequest) -> Response:
        service.check_model(body.model)
        messages = [message.for_template for message in body.messages]
        task = await service.chat(body.asked, messages, body.offer)
        return await sent(request, body, task, ChatShape(service.model))

    async def complete(request: Request, body: CompletionRequest) -> Response:
        service.check_model(body.model)
        task = await service.completion(body.asked, body.prompt)
        shape = CompletionShape(service.model, service.text_of(body.prompt) if body.echo else "")
        return await sent(request, body, task, shape)

    async def sent(
        request: Request, body: Sampled, task: Task, shape: ChatShape | CompletionShape
    ) -> Response:
        if body.stream_options and not body.stream:
            raise ApiError(400, "stream_options is for streamed answers; set stream")
        usage = body.stream_options is not None and body.stream_options.include_usage
        return await answered(request, service, task, Events(shape, usage), body.stream)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    async def model(request: Request) -> Response:
        service.check_model(request.path_params["name"])
        return JSONResponse(_model(service))

    endpoints = [
        posted("/v1/chat/completions", ChatRequest, chat, CHAT),
        posted("/api/v1/chat/completions", ChatRequest, chat, SAME_CHAT),
        posted("/v1/completions", CompletionRequest, complete, COMPLETION),
        Endpoint("/v1/models", models, about=MODELS),
        Endpoint("/v1/models/{name:path}", model, about=MODEL),
    ]
    return Dialect(endpoints, error_body)


def _model(service: Service) -> ModelCard:
    return {"id": service.model, "object": "model", "created": service.started, "owned_by": "cake"}
