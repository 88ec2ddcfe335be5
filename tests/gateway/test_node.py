"""The official `openai` client, and faults, against a real node with two gateways."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from albireo.client import Client
from albireo.gateway.link import STATUS_AGE_S

from .conftest import KEYS, MODEL, HttpNode
from .serving import wait_for

pytestmark = pytest.mark.node

HELLO: Any = [{"role": "user", "content": "Hello"}]
SAMPLING: Any = {"max_tokens": 12, "seed": 5, "extra_body": {"ignore_eos": True}}
KEY = KEYS["alice"]


@pytest.fixture(params=["tcp", "unix"])
def client(request: pytest.FixtureRequest, http_node: HttpNode) -> Iterator[openai.OpenAI]:
    transport = httpx2.HTTPTransport(uds=http_node.uds) if request.param == "unix" else None
    with openai.OpenAI(
        base_url=f"{http_node.http}/v1", api_key=KEY, max_retries=0,
        http_client=httpx2.Client(transport=transport),
    ) as client:  # fmt: skip
        yield client


def tree(node: HttpNode) -> dict[str, Any]:
    with Client.connect(node=node.name) as client:
        return client.status()


def pids(node: HttpNode) -> dict[str, int]:
    return {actor["name"]: actor["pid"] for actor in tree(node)["actors"]}


def test_models(client: openai.OpenAI) -> None:
    assert [each.id for each in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "albireo"


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Once", **SAMPLING)
    again = client.completions.create(model=MODEL, prompt="Once", **SAMPLING)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text == again.choices[0].text != ""
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 12)


def test_batches_of_prompts_and_ids(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=[[1, 2], [3, 4, 5], [1, 2]], **SAMPLING)
    assert [each.index for each in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 36)


def test_streams_add_up(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="Once", **SAMPLING)
    stream = client.completions.create(
        model=MODEL, prompt="Once", stream=True, stream_options={"include_usage": True}, **SAMPLING
    )
    chunks = list(stream)
    assert "".join(c.text for each in chunks for c in each.choices) == whole.choices[0].text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12


def test_chat(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, **SAMPLING)
    chunks = list(
        client.chat.completions.create(model=MODEL, messages=HELLO, stream=True, **SAMPLING)
    )
    assert whole.choices[0].message.role == "assistant"
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(each.choices[0].delta.content or "" for each in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def test_many_streams_of_the_async_client(http_node: HttpNode) -> None:
    async def one(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, max_tokens=20, seed=seed % 3,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        return "".join([each.choices[0].delta.content or "" async for each in stream])

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{http_node.http}/v1", api_key=KEY) as client:
            return await asyncio.gather(*(one(client, seed) for seed in range(30)))

    texts = asyncio.run(run())
    assert len(set(texts)) == 3
    assert all(texts[seed] == texts[seed % 3] for seed in range(30))


def test_errors_are_the_clients_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="unknown parameter `colour`"):
        client.completions.create(model=MODEL, prompt="a", extra_body={"colour": "red"})
    with pytest.raises(openai.BadRequestError, match="`functions` is not supported"):
        client.chat.completions.create(
            model=MODEL, messages=HELLO, functions=[{"name": "f", "parameters": {}}]
        )
    with pytest.raises(openai.BadRequestError, match="structured output needs a model with an end"):
        client.chat.completions.create(
            model=MODEL, messages=HELLO,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )  # fmt: skip
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="a" * 600)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong-key").models.list()


def test_tokenize_and_detokenize(http_node: HttpNode) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=http_node.http, headers=headers) as client:
        found = client.post("/tokenize", json={"prompt": "héllo"}).json()
        assert found["count"] == len(found["tokens"]) == 6
        text = client.post("/detokenize", json={"tokens": found["tokens"]}).json()
        assert text == {"prompt": "héllo"}
        assert client.post("/detokenize", json={"tokens": [10**6]}).status_code == 400


def test_metrics_count_requests(http_node: HttpNode) -> None:
    def generated() -> float:
        text = httpx2.get(f"{http_node.http}/metrics").text
        return {
            each.name: each.value
            for family in text_string_to_metric_families(text)
            for each in family.samples
        }.get("albireo:generation_tokens_total", 0.0)

    before = generated()
    with Client.connect(node=http_node.name) as client:
        client.generate([1, 2, 3], max_tokens=50, ignore_eos=True)
    wait_for(lambda: generated() >= before + 50)


def test_a_client_that_leaves_frees_its_request(http_node: HttpNode) -> None:
    with openai.OpenAI(base_url=f"{http_node.http}/v1", api_key=KEY) as client:
        stream = client.completions.create(
            model=MODEL, prompt="a", stream=True, max_tokens=500, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        assert tree(http_node)["requests"]["in_flight"] == 1
        stream.close()
        wait_for(lambda: tree(http_node)["requests"]["in_flight"] == 0, 0.5)


def test_a_gateway_that_is_killed_is_started_again(http_node: HttpNode) -> None:
    before = pids(http_node)
    os.kill(before["gateway0"], signal.SIGKILL)
    wait_for(lambda: pids(http_node)["gateway0"] != before["gateway0"])
    wait_for(lambda: all(a["state"] == "ready" for a in tree(http_node)["actors"]))
    after = {actor["name"]: actor for actor in tree(http_node)["actors"]}
    assert after["gateway0"]["restarts"] == 1
    assert after["gateway1"]["pid"] == before["gateway1"]
    for _ in range(10):
        assert httpx2.get(f"{http_node.http}/health").status_code == 200


def test_the_death_of_the_router_ends_streams_with_an_error_and_no_more(
    http_node: HttpNode,
) -> None:
    with openai.OpenAI(base_url=f"{http_node.http}/v1", api_key=KEY, max_retries=0) as client:
        stream = client.completions.create(
            model=MODEL, prompt="a", stream=True, max_tokens=500, extra_body={"ignore_eos": True}
        )
        chunks = iter(stream)
        next(chunks)
        os.kill(pids(http_node)["router"], signal.SIGKILL)
        with pytest.raises(openai.APIError, match="connection"):
            for _ in chunks:
                pass
        time.sleep(STATUS_AGE_S)
        answer = client.completions.create(model=MODEL, prompt="Once", **SAMPLING)
        assert answer.choices[0].finish_reason == "length"
    wait_for(lambda: httpx2.get(f"{http_node.http}/health").status_code == 200)
