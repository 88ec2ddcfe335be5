"""GET /openapi.json: the document of this API, made from the Structs of requests and answers."""

from __future__ import annotations

import functools
from typing import Any

import msgspec

from albireo.live.picture import Picture

from .answers import (
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionChunk,
    Detokenized,
    Model,
    ModelList,
    Tokenized,
    Version,
)
from .errors import ErrorAnswer
from .http import Request
from .link import NodeLink
from .requests import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

_REF = "#/components/schemas/{name}"
_POSTS: tuple[tuple[str, type, type, type | None, str], ...] = (
    ("/v1/completions", CompletionRequest, Completion, CompletionChunk, "Continue prompts."),
    ("/v1/chat/completions", ChatRequest, ChatCompletion, ChatChunk, "Answer a conversation."),
    ("/tokenize", TokenizeRequest, Tokenized, None, "Text or a conversation to token ids."),
    ("/detokenize", DetokenizeRequest, Detokenized, None, "Token ids to text."),
)
_GETS: tuple[tuple[str, type, str], ...] = (
    ("/v1/models", ModelList, "The model that is served."),
    ("/version", Version, "Of the node's software."),
    ("/top", Picture, "What the node does right now; what `albireo top --json` prints."),
)
_ERRORS = {
    "400": "The request is not valid, or too long.",
    "401": "An API key is missing or wrong.",
    "404": "There is no such model.",
    "408": "The body did not come in time.",
    "413": "The body is too large.",
    "500": "A fault in the node.",
    "503": "The node cannot take it now: try again after Retry-After seconds.",
}


async def openapi(request: Request, link: NodeLink) -> None:
    await request.answer(200, document(link.welcome.version))


@functools.cache
def document(version: str) -> bytes:
    """The document as JSON."""
    types: list[type] = [ErrorAnswer, Model]
    for _, body, answer, chunk, _text in _POSTS:
        types += [body, answer, *((chunk,) if chunk else ())]
    types += [answer for _, answer, _text in _GETS]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    # decode.py drops what is null in a message.
    components["Message"]["additionalProperties"] = {"type": "null"}
    schema_of = dict(zip(types, schemas, strict=True))
    paths: dict[str, Any] = {}
    for path, body, answer, chunk, text in _POSTS:
        good: dict[str, Any] = {"application/json": {"schema": schema_of[answer]}}
        if chunk:
            good["text/event-stream"] = {
                "schema": _events(schema_of[chunk], schema_of[ErrorAnswer])
            }
        paths[path] = {
            "post": {
                "summary": text,
                "requestBody": {"required": True, "content": _json(schema_of[body])},
                "responses": _responses(good, schema_of[ErrorAnswer]),
            }
        }
    for path, answer, text in _GETS:
        paths[path] = _get(text, _json(schema_of[answer]), schema_of[ErrorAnswer])
    paths["/v1/models/{model}"] = _get(
        "The model, by its name.", _json(schema_of[Model]), schema_of[ErrorAnswer]
    )
    paths["/v1/models/{model}"]["get"]["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    ]
    html = {"text/html": {"schema": {"type": "string"}}}
    paths["/"] = _get("A page with what the node does, and a chat.", html, schema_of[ErrorAnswer])
    plain = {"text/plain": {"schema": {"type": "string"}}}
    paths["/metrics"] = _get("For Prometheus.", plain, schema_of[ErrorAnswer])
    for path, methods in (("/health", ("get",)), ("/ping", ("get", "post"))):
        empty = {"200": {"description": "Requests are taken."}, "503": {"description": "Not now."}}
        paths[path] = {
            method: {"summary": "Whether the node takes requests.", "responses": empty}
            for method in methods
        }
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "Albireo", "version": version},
            "paths": paths,
            "components": {
                "schemas": components,
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            },
            "security": [{}, {"key": []}],
        }
    )


def _events(chunk: dict[str, Any], error: dict[str, Any]) -> dict[str, Any]:
    """Of one event of a stream, as OpenAPI describes them: its data is JSON in a string."""
    content = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [chunk, error]},
    }
    data = {"anyOf": [{"const": "[DONE]"}, content]}
    return {"type": "object", "required": ["data"], "properties": {"data": data}}


def _get(text: str, content: dict[str, Any], error: dict[str, Any]) -> dict[str, Any]:
    return {"get": {"summary": text, "responses": _responses(content, error)}}


def _responses(good: dict[str, Any], error: dict[str, Any]) -> dict[str, Any]:
    answers: dict[str, Any] = {"200": {"description": "The answer.", "content": good}}
    for status, text in _ERRORS.items():
        answers[status] = {"description": text, "content": _json(error)}
    return answers


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
