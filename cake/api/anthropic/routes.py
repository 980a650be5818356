"""Anthropic's routes over a service."""

from datetime import datetime, timezone

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cake.api.answering import answered
from cake.api.anthropic.answers import (
    AnthropicError,
    MessageEvent,
    MessageSaid,
    ModelShown,
    ModelsShown,
    TokensCounted,
)
from cake.api.anthropic.messages import MessageReply, error_body
from cake.api.anthropic.requests import MessagesRequest, Prompt
from cake.api.handlers import About, Dialect, Endpoint, posted
from cake.api.service import Service

VERSION_HEADER = "anthropic-version"  # which all clients of this dialect send

MESSAGES = About("Answer a chat.", MessageSaid, MessageEvent, error=AnthropicError, group="Anthropic")
COUNT = About("How many tokens a chat has.", TokensCounted, error=AnthropicError, group="Anthropic")


def anthropic_dialect(service: Service) -> Dialect:
    """What clients of Anthropic's API ask for."""

    async def messages(request: Request, body: MessagesRequest) -> Response:
        service.check_model(body.model)
        task = await service.chat(body.asked, body.for_template, body.offer)
        reply = MessageReply(service.model, body.max_tokens)
        return await answered(request, service, task, reply, body.stream)

    async def count_tokens(request: Request, body: Prompt) -> Response:
        service.check_model(body.model)
        prompt = await service.chat_prompt(body.for_template, body.offer)
        counted: TokensCounted = {"input_tokens": len(prompt)}
        return JSONResponse(counted)

    async def models(request: Request) -> Response:
        shown: ModelsShown = {
            "data": [_model(service)],
            "has_more": False,
            "first_id": service.model,
            "last_id": service.model,
        }
        return JSONResponse(shown)

    async def model(request: Request) -> Response:
        service.check_model(request.path_params["name"])
        return JSONResponse(_model(service))

    endpoints = [
        posted("/v1/messages", MessagesRequest, messages, MESSAGES),
        posted("/v1/messages/count_tokens", Prompt, count_tokens, COUNT),
        Endpoint("/v1/models", models, header=VERSION_HEADER),
        Endpoint("/v1/models/{name:path}", model, header=VERSION_HEADER),
    ]
    return Dialect(endpoints, error_body, _is_spoken)


def _model(service: Service) -> ModelShown:
    began = datetime.fromtimestamp(service.started, timezone.utc)
    return {
        "type": "model",
        "id": service.model,
        "display_name": service.model,
        "created_at": began.isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": service.context,
        "max_tokens": service.context,
    }


def _is_spoken(request: Request) -> bool:
    return VERSION_HEADER in request.headers
