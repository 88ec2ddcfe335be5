"""The ASGI application: from a path to its endpoint, and from whatever goes wrong to an answer.

A plain callable, not a framework's: on the way of a token there is nothing
between the endpoint and the server.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from albireo.client import AlbireoError
from albireo.ipc.keys import ApiKeys

from .chat import chat_completions
from .completions import completions
from .errors import HttpError, http_error, internal
from .http import AsgiReceive, AsgiSend, ClientGone, Request, Scope
from .link import NodeLink
from .openapi import openapi
from .page import page, top
from .probes import health, metrics, model, models, version
from .texts import detokenize, tokenize

_log = logging.getLogger(__name__)

Endpoint = Callable[[Request, NodeLink], Awaitable[None]]

_GET = ("GET", "HEAD")
_ENDPOINTS: Mapping[str, tuple[tuple[str, ...], Endpoint]] = {
    "/v1/completions": (("POST",), completions),
    "/v1/chat/completions": (("POST",), chat_completions),
    "/v1/models": (_GET, models),
    "/tokenize": (("POST",), tokenize),
    "/detokenize": (("POST",), detokenize),
    "/health": (_GET, health),
    "/ping": (("GET", "HEAD", "POST"), health),
    "/version": (_GET, version),
    "/metrics": (_GET, metrics),
    "/openapi.json": (_GET, openapi),
    "/": (_GET, page),
    "/top": (_GET, top),
}
_OPEN = frozenset({"/", "/health", "/ping", "/version", "/metrics", "/openapi.json"})
"""Paths that ask for no key."""


def make_app(
    link: NodeLink, keys: ApiKeys, allowed_origins: tuple[str, ...], stream_interval: int = 1
) -> Any:
    """The application; with CORS around it where origins are allowed."""
    app = Gateway(link, keys, stream_interval)
    if not allowed_origins:
        return app
    from starlette.middleware.cors import CORSMiddleware

    return CORSMiddleware(
        app,
        allow_origins=allowed_origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=("x-request-id",),
    )


class Gateway:
    """An ASGI application."""

    def __init__(self, link: NodeLink, keys: ApiKeys, stream_interval: int) -> None:
        self._link = link
        self._keys = keys
        self._stream_interval = stream_interval

    async def __call__(self, scope: Scope, receive: AsgiReceive, send: AsgiSend) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"the gateway does not speak {scope['type']}")
        request = Request(scope, receive, send, self._stream_interval)
        try:
            try:
                endpoint = _find(request)
                self._admit(request)
                await endpoint(request, self._link)
            except AlbireoError as error:
                raise http_error(error, request.grammar) from None
        except ClientGone:
            pass
        except HttpError as error:
            await _fail(request, error)
        except asyncio.CancelledError:
            raise
        except Exception:
            _log.exception("%s %s (%s) has failed", request.method, request.path, request.id)
            await _fail(request, internal("the request met a fault in the gateway; see its log"))

    def _admit(self, request: Request) -> None:
        """Names the tenant.  Raises HttpError (401) without a key of ours."""
        if not len(self._keys) or request.path in _OPEN:
            return
        name = self._keys.name_of_bearer(request.header(b"authorization"))
        if name is None:
            raise HttpError(
                401,
                "this node asks for an API key: send the header `Authorization: Bearer KEY`",
                kind="authentication_error",
                code="invalid_api_key",
                headers=((b"www-authenticate", b"Bearer"),),
            )
        request.tenant = name


def _find(request: Request) -> Endpoint:
    found = _ENDPOINTS.get(request.path)
    if found is None and request.path.startswith("/v1/models/"):
        found = _GET, model
    if found is None:
        raise HttpError(
            404, f"there is nothing at {request.path[:128]!r}; /openapi.json lists what there is",
            code="not_found",
        )  # fmt: skip
    methods, endpoint = found
    if request.method not in methods:
        raise HttpError(
            405,
            f"{request.path} answers {' and '.join(methods)}, not {request.method}",
            code="method_not_allowed",
            headers=((b"allow", ", ".join(methods).encode()),),
        )
    return endpoint


async def _fail(request: Request, error: HttpError) -> None:
    """An answer where there is none yet; else the broken-off answer has to say it."""
    if request.started:
        raise error
    await request.fail(error)
