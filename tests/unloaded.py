"""A server whose model is not loaded, for requests that need none."""

from typing import cast

import httpx2
from starlette.applications import Starlette

from cake.api.app import ANYWHERE, build_app
from cake.api.origins import Origins
from cake.api.service import Service
from cake.cluster_view import ClusterView
from cake.generator import Generator
from cake.model.sampling import SamplingParams


def unloaded_app(model: str = "tiny", api_key: str | None = None, origins: Origins = ANYWHERE) -> Starlette:
    """Its application."""
    service = Service(cast("Generator", None), model, SamplingParams())
    return build_app(service, cast("ClusterView", None), api_key, origins)


def client_of(app: Starlette) -> httpx2.AsyncClient:
    """A client that asks it without a network."""
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://127.0.0.1:8080")
