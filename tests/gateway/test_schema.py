"""Requests that schemathesis makes of /openapi.json, valid ones and others, at a real node.

Whatever is asked: no status of 500, none that the document does not name, and
every answer as the document describes it.  What the document forbids is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode

from albireo.gateway.decode import decode
from albireo.gateway.errors import HttpError
from albireo.gateway.openapi import document
from albireo.gateway.requests import ChatRequest, CompletionRequest
from albireo.gateway.sampling import chat_params, completion_params
from albireo.node.launch import stop_node

from .conftest import HttpNode, start_http_node

POSTS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
GETS = ["/v1/models", "/v1/models/{model}", "/version", "/metrics", "/health", "/ping", "/top", "/"]
EXAMPLES = 40
_SETTINGS = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
_RANGES_ARE_NOT_ALL = [schemathesis.checks.positive_data_acceptance]
"""A vocabulary, a context, and fields that exclude each other are not in the document."""


@pytest.fixture(scope="module")
def server(module_home: Path, tiny_model_dir: Path) -> Iterator[HttpNode]:
    """Short steps, so that an answer without max_tokens takes no time."""
    node = start_http_node(
        module_home, name="schema", device="sim", sim_step_ms=0.05, model=str(tiny_model_dir),
        served_model_name="tiny",
    )  # fmt: skip
    yield node
    stop_node(node.name, now=True, timeout_s=20)


@pytest.fixture(scope="module")
def schema(server: HttpNode) -> Any:
    return schemathesis.openapi.from_dict(httpx2.get(f"{server.http}/openapi.json").json())


def possible(body: dict[str, Any], path: str) -> dict[str, Any]:
    """Of a valid body, what the document cannot say, made possible; and short answers.

    The model's name and vocabulary, text in messages, one of two fields.
    """
    body = dict(body)
    if path == "/tokenize" and body.get("messages"):
        body.pop("prompt", None)
    elif path == "/tokenize":
        body = {**body, "prompt": body.get("prompt") or "hello", "messages": None}
    for name in ("model", "request_id", "top_logprobs", "max_completion_tokens", "logit_bias"):
        body.pop(name, None)
    for name in ("prompt", "tokens", "stop_token_ids", "allowed_token_ids"):
        if name in body:
            body[name] = in_vocabulary(body[name])
    for message in body.get("messages") or ():
        message["content"] = "hello"
        for name in ("tool_calls", "annotations"):
            message.pop(name, None)
    for name, most in (("max_tokens", 20), ("min_tokens", 5), ("n", 4)):
        if isinstance(body.get(name), int | float):
            body[name] = min(body[name], most)
    return body


def in_vocabulary(tokens: Any) -> Any:
    if isinstance(tokens, list):
        return [in_vocabulary(each) for each in tokens]
    return tokens % 256 if isinstance(tokens, int | float) else tokens


def ask(
    schema: Any, server: HttpNode, path: str, method: str, mode: GenerationMode
) -> Counter[int]:
    """How often each status came."""
    statuses: Counter[int] = Counter()

    @_SETTINGS
    @given(schema[path][method].as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body = possible(case.body, path)
        answer = case.call(base_url=server.http, timeout=20)
        statuses[answer.status_code] += 1
        case.validate_response(answer, excluded_checks=_RANGES_ARE_NOT_ALL)

    run()
    return statuses


@pytest.mark.node
@pytest.mark.parametrize("path", POSTS)
def test_what_the_document_allows(schema: Any, server: HttpNode, path: str) -> None:
    statuses = ask(schema, server, path, "POST", GenerationMode.POSITIVE)
    assert set(statuses) <= {200, 400} and statuses[200] >= EXAMPLES / 4, statuses
    assert httpx2.get(f"{server.http}/health").status_code == 200


@pytest.mark.node
@pytest.mark.parametrize("path", POSTS)
def test_what_the_document_forbids(schema: Any, server: HttpNode, path: str) -> None:
    statuses = ask(schema, server, path, "POST", GenerationMode.NEGATIVE)
    # A body may name a model that is not there, too.
    assert set(statuses) <= {400, 404}, statuses


@pytest.mark.node
@pytest.mark.parametrize("path", GETS)
def test_what_is_only_read(schema: Any, server: HttpNode, path: str) -> None:
    statuses = ask(schema, server, path, "GET", GenerationMode.POSITIVE)
    assert set(statuses) == {404 if "{" in path else 200}, statuses


def numbers(name: str) -> dict[str, dict[str, float]]:
    """Fields of a request that are numbers, with their ranges."""
    properties = json.loads(document("1"))["components"]["schemas"][name]["properties"]
    found = {}
    for field, said in properties.items():
        for kind in said.get("anyOf", []):
            if kind.get("type") in ("number", "integer"):
                found[field] = kind
    return found


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
def test_ranges_are_those_that_are_checked(kind: type) -> None:
    asked = {"prompt": "a", "echo": True} if kind is CompletionRequest else {"messages": []}
    check: Any = completion_params if kind is CompletionRequest else chat_params

    def accepted(field: str, value: float) -> bool:
        # A logprob needs to be asked for, and two names of one thing exclude each other.
        more = {"logprobs": True} if field == "top_logprobs" else {}
        try:
            check(decode(kind, msgspec.json.encode({**asked, **more, field: value})))
        except HttpError:
            return False
        return True

    ranges = numbers(kind.__name__)
    assert {"max_tokens", "n", "temperature", "top_p", "seed", "top_k", "prompt_logprobs"} <= set(
        ranges
    )
    for field, said in ranges.items():
        step = 1 if said["type"] == "integer" else 1e-3
        for bound, good, bad in (
            ("minimum", 0, -step), ("maximum", 0, step), ("exclusiveMinimum", step, 0),
        ):  # fmt: skip
            if bound in said:
                assert accepted(field, said[bound] + good), (field, bound)
                assert not accepted(field, said[bound] + bad), (field, bound)
