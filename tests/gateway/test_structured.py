"""The official `openai` client with structured output and tools, on a model of random weights."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from pydantic import BaseModel, Field

from albireo.client import Client, Tool, Tools
from albireo.node.launch import stop_node

from .conftest import HttpNode, start_http_node

pytestmark = pytest.mark.node

HELLO: Any = [{"role": "user", "content": "Hello"}]
SCHEMA: Any = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "d", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
MODEL = "tiny"


class Trip(BaseModel):
    city: str = Field(max_length=6)
    nights: int = Field(ge=0, le=99)


@pytest.fixture(scope="module")
def node(module_home: Path, tiny_model_dir: Path) -> Iterator[HttpNode]:
    model = module_home / "long"
    shutil.copytree(tiny_model_dir, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    node = start_http_node(
        module_home, name="bound", device="cpu", model=str(model), load_format="dummy",
        served_model_name=MODEL, dtype="float32", threads=1,
    )  # fmt: skip
    yield node
    stop_node(node.name, now=True, timeout_s=20)


@pytest.fixture
def client(node: HttpNode) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{node.http}/v1", api_key="-", max_retries=0) as client:
        yield client


def check(arguments: str) -> None:
    found = json.loads(arguments)
    assert list(found) == ["city", "days"]
    assert len(found["city"]) <= 8 and 1 <= found["days"] <= 9


def test_response_formats(client: openai.OpenAI) -> None:
    schema = {"name": "trip", "strict": True, "schema": SCHEMA}
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=200, n=3,
        response_format={"type": "json_schema", "json_schema": schema},  # type: ignore[arg-type,misc]
    )  # fmt: skip
    for choice in answer.choices:
        check(choice.message.content or "")
        assert choice.finish_reason == "stop"
    text = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=8, response_format={"type": "json_object"}
    )
    assert (text.choices[0].message.content or "").startswith("{")
    parsed = client.chat.completions.parse(
        model=MODEL, messages=HELLO, max_tokens=200, response_format=Trip
    )
    assert isinstance(parsed.choices[0].message.parsed, Trip)


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"guided_regex": "[0-9]{4}"}, "[0-9]{4}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'root ::= "a" [bc] "d"'}, "a[bc]d"),
        ({"guided_json": {"enum": [1, "x"]}}, '1|"x"'),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
    ],
)
def test_guided(client: openai.OpenAI, extra: dict[str, Any], pattern: str) -> None:
    for stream in (False, True):
        answer: Any = client.completions.create(
            model=MODEL, prompt="x", max_tokens=50, extra_body=extra, stream=stream
        )
        if stream:
            text = "".join(chunk.choices[0].text for chunk in answer)
        else:
            text = answer.choices[0].text
            assert answer.choices[0].finish_reason == "stop"
        assert re.fullmatch(pattern, text)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"guided_regex": "("}, "unclosed group"),
        ({"guided_json": {"type": "nope"}}, "nope"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "cannot both hold"),
        ({"structured_outputs": {}}, "exactly one"),
        ({"response_format": {"type": "json_schema"}}, "needs json_schema"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "cannot both bind"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
         "no function 'x'"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "unlike 'a b'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_400(client: openai.OpenAI, extra: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        client.chat.completions.create(model=MODEL, messages=HELLO, extra_body=extra)


NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_calls(client: openai.OpenAI, choice: Any) -> None:
    asked: Any = {
        "model": MODEL, "messages": HELLO, "tools": TOOLS, "tool_choice": choice,
        "parallel_tool_calls": False, "max_tokens": 250, "seed": 3, "n": 2,
    }  # fmt: skip
    answer = client.chat.completions.create(**asked)
    for each in answer.choices:
        assert each.finish_reason == "tool_calls"
        assert each.message.content is None
        assert each.message.tool_calls is not None
        (call,) = each.message.tool_calls
        assert call.type == "function" and call.id.startswith("call_")
        if call.function.name == "weather":
            check(call.function.arguments)
        else:
            assert choice == "required" and call.function.arguments == "{}"
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion()
    for one, other in zip(answer.choices, streamed.choices, strict=True):
        assert other.finish_reason == "tool_calls"
        assert one.message.tool_calls is not None and other.message.tool_calls is not None
        assert [call.function.name for call in one.message.tool_calls] == [
            call.function.name for call in other.message.tool_calls
        ]
        assert (
            one.message.tool_calls[0].function.arguments
            == other.message.tool_calls[0].function.arguments
        )


def test_the_async_client_has_all_of_it_over_the_unix_socket(node: HttpNode) -> None:
    async def run() -> None:
        transport = httpx2.AsyncHTTPTransport(uds=node.uds)
        async with openai.AsyncOpenAI(
            base_url="http://node/v1", api_key="-", max_retries=0,
            http_client=httpx2.AsyncClient(transport=transport),
        ) as client:  # fmt: skip
            asked: Any = {"model": MODEL, "messages": HELLO, "max_tokens": 250, "seed": 3}
            parsed, called, streamed = await asyncio.gather(
                client.chat.completions.parse(**asked, response_format=Trip),
                client.chat.completions.create(**asked, tools=TOOLS, tool_choice=NAMED),
                text_of(client, asked | {"max_tokens": 20, "extra_body": {"ignore_eos": True}}),
            )
        assert isinstance(parsed.choices[0].message.parsed, Trip)
        calls = called.choices[0].message.tool_calls
        assert calls is not None and calls[0].type == "function"
        check(calls[0].function.arguments)
        assert streamed

    asyncio.run(run())


async def text_of(client: openai.AsyncOpenAI, asked: dict[str, Any]) -> str:
    """A streamed answer."""
    stream = await client.chat.completions.create(**asked, stream=True)
    return "".join([each.choices[0].delta.content or "" async for each in stream])


def test_a_conversation_with_calls_goes_on(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages: Any = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12:00"},
    ]
    for choice in ("none", "auto"):
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, tools=TOOLS, tool_choice=choice, max_tokens=5, seed=1,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None and answer.usage.prompt_tokens > 20


def test_the_client_library_has_the_same(node: HttpNode) -> None:
    tools = Tools(functions=(Tool(name="weather", parameters=SCHEMA),), name="weather")
    with Client.connect(node=node.name) as client:
        answer = client.chat(HELLO, tools=tools, max_tokens=250)
        assert answer.finish_reason == "tool_calls" and answer.text == ""
        (call,) = answer.tool_calls
        assert call.name == "weather"
        check(call.arguments)
        raw = "".join(
            delta.text for delta in client.chat(HELLO, tools=tools, max_tokens=250, stream=True)
        )
        assert raw.startswith("<tool_call>") and raw.endswith("</tool_call>")
