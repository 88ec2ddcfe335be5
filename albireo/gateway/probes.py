"""What is asked about the node itself: /v1/models, /health, /ping, /version, /metrics."""

from __future__ import annotations

import asyncio
import time

import msgspec

from albireo.client import AlbireoError

from .answers import Model, ModelList, Version
from .errors import HttpError
from .exposition import CONTENT_TYPE
from .http import Request
from .link import NodeLink
from .metrics import exposition

HEALTH_TIMEOUT_S = 2.0
_STARTED = int(time.time())


async def models(request: Request, link: NodeLink) -> None:
    answer = ModelList(data=[_model(link)])
    await request.answer(200, msgspec.json.encode(answer))


async def model(request: Request, link: NodeLink) -> None:
    """GET /v1/models/<id>."""
    name = request.path.removeprefix("/v1/models/")
    found = _model(link)
    if name != found.id:
        raise HttpError(
            404,
            f"the model {name[:128]!r} is not served here; {found.id!r} is",
            param="model",
            code="model_not_found",
        )
    await request.answer(200, msgspec.json.encode(found))


async def health(request: Request, link: NodeLink) -> None:
    """200 when a group can take requests, else 503; no body."""
    try:
        async with asyncio.timeout(HEALTH_TIMEOUT_S):
            tree = await link.status()
        ready = any(group["state"] == "ready" for group in tree["groups"])
        ready = ready and not tree["draining"]
    except (AlbireoError, TimeoutError):
        ready = False
    await request.answer(200 if ready else 503, b"", () if ready else ((b"retry-after", b"1"),))


async def version(request: Request, link: NodeLink) -> None:
    await request.answer(200, msgspec.json.encode(Version(version=link.welcome.version)))


async def metrics(request: Request, link: NodeLink) -> None:
    sample, j_per_token = await link.watch.measure()
    body = exposition(sample, j_per_token)
    await request.answer(200, body, content_type=(b"content-type", CONTENT_TYPE))


def _model(link: NodeLink) -> Model:
    welcome = link.welcome
    return Model(id=welcome.model, created=_STARTED, max_model_len=welcome.max_model_len)
