"""A server whose model is not loaded, for requests that need none."""

from types import SimpleNamespace
from typing import cast

import httpx2
from conftest import TINY
from starlette.applications import Starlette

from cake.api.app import ANYWHERE, build_app
from cake.api.origins import Origins
from cake.api.service import Service
from cake.cluster_view import ClusterView
from cake.generator import Generator
from cake.model.config import ModelConfig
from cake.model.sampling import SamplingParams


def unloaded_app(model: str = "tiny", api_key: str | None = None, origins: Origins = ANYWHERE) -> Starlette:
    """Its application."""
    config = ModelConfig.from_hf({**TINY, "architectures": ["LlamaForCausalLM"]})
    generator = SimpleNamespace(pipeline=SimpleNamespace(config=config, context=512))
    view = cast("ClusterView", SimpleNamespace(condition="ready"))
    service = Service(cast("Generator", generator), model, SamplingParams())
    return build_app(service, view, api_key, origins)


def client_of(app: Starlette) -> httpx2.AsyncClient:
    """A client that asks it without a network."""
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://127.0.0.1:8080")
