"""/v1/chat/completions: messages, the first chunk's role, log-probabilities, streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from albireo.client import Delta, End, InvalidRequest, TemplateOptions
from albireo.gateway.link import Ask

from .played import MODEL, PlayedLink, Script, chunks, failing, post

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "now"}}


def ask(body: dict[str, Any], link: PlayedLink | None = None) -> dict[str, Any]:
    response = post(PATH, {"messages": HELLO} | body, link)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_an_answer_has_every_field() -> None:
    answer = ask({"max_tokens": 2, "n": 2})
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 1_700_000_000
    assert answer.pop("usage") == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert [each["message"]["content"] for each in answer["choices"]] == [" hi0 hi1", " HI0 HI1"]
    assert answer["choices"][1] == {
        "index": 1,
        "message": {"role": "assistant", "content": " HI0 HI1", "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }
    assert (answer["object"], answer["model"]) == ("chat.completion", MODEL)


def test_content_parts_are_joined_and_developer_is_system() -> None:
    link = PlayedLink()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "assistant", "content": "yes", "tool_calls": None, "refusal": None},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        {"role": "user", "content": parts},
    ]
    ask({"messages": messages}, link)
    sent = link.asks[0].messages
    assert sent is not None
    assert [(each.role, each.content) for each in sent] == [
        ("system", "be brief"), ("assistant", "yes"), ("tool", "42"), ("user", "a\nb"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "content"),
        ({"role": "user", "content": [{"type": "text"}]}, "content"),
        ({"role": "user", "content": None}, "content"),
        ({"role": "user", "content": [{"type": "refusal", "refusal": None}]}, "content"),
        ({"role": "assistant", "content": "x", "reasoning_content": "so"}, "reasoning_content"),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, "tool_calls"),
        ({"role": "user", "content": "x", "colour": "red"}, "colour"),
        ({"role": "user", "content": "x", "name": 5}, "name"),
        ({"content": "x"}, "messages"),
        ({"role": 5, "content": "x"}, "role"),
    ],
)
def test_a_message_that_cannot_be_served_is_named(message: Any, param: str) -> None:
    response = post(PATH, {"messages": [*HELLO, message]})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"].startswith("messages[1]")
    assert param in error["param"]


def test_messages_that_clients_may_send() -> None:
    """What servers answered comes back, with all that is null in it."""
    link = PlayedLink()
    no = {"type": "refusal", "refusal": "no"}
    messages = [
        {"role": "system", "content": "be brief", "name": "rules"},
        {"role": "user", "content": "x", "name": "bob"},
        {"role": "assistant", "content": None, "tool_calls": [], "reasoning_content": None},
        {"role": "assistant", "refusal": "no", "name": "eve", "audio": None, "function_call": None},
        {"role": "assistant", "content": "", "refusal": "no", "annotations": []},
        {"role": "assistant", "content": [no, {"type": "text", "text": "or", "at": None}]},
        {"role": "assistant", "content": "yes", "refusal": "no"},
        {"role": "function", "name": "f", "content": "42"},
    ]
    ask({"messages": messages}, link)
    sent = link.asks[0].messages
    assert sent is not None
    assert [(each.role, each.content, each.name) for each in sent] == [
        ("system", "be brief", "rules"), ("user", "x", "bob"), ("assistant", "", ""),
        ("assistant", "no", "eve"), ("assistant", "no", ""), ("assistant", "no\nor", ""),
        ("assistant", "yes\nno", ""), ("function", "42", "f"),
    ]  # fmt: skip
    assert post("/tokenize", {"messages": messages}).status_code == 200


def test_logprobs() -> None:
    answer = ask({"logprobs": True, "top_logprobs": 1, "max_tokens": 1})
    assert answer["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": " hi0",
                "logprob": -0.5,
                "bytes": list(b" hi0"),
                "top_logprobs": [{"token": "a", "logprob": -0.1, "bytes": [97]}],
            }
        ],
        "refusal": None,
    }
    assert (
        ask({"logprobs": True, "max_tokens": 1})["choices"][0]["logprobs"]["content"][0][
            "top_logprobs"
        ]
        == []
    )


def test_the_newer_name_of_max_tokens() -> None:
    link = PlayedLink()
    ask({"max_completion_tokens": 3}, link)
    ask({"max_completion_tokens": 3, "max_tokens": 3}, link)
    ask({}, link)
    assert [each.params.max_tokens for each in link.asks] == [3, 3, None]
    assert (
        post(PATH, {"messages": HELLO, "max_completion_tokens": 3, "max_tokens": 4}).json()[
            "error"
        ]["param"]
        == "max_tokens"
    )


def test_a_stream_adds_up_and_its_first_chunk_has_the_role() -> None:
    body = {"messages": HELLO, "n": 2, "max_tokens": 3, "logprobs": True, "stream": True}
    got = chunks(post(PATH, body | {"stream_options": {"include_usage": True}}))
    assert got[-1]["choices"] == []
    assert got[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
    for index, text in ((0, " hi0 hi1 hi2"), (1, " HI0 HI1 HI2")):
        own = [c for g in got for c in g["choices"] if c["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in each["delta"] for each in own[1:])
        assert "".join(each["delta"]["content"] for each in own) == text
        assert [each["finish_reason"] for each in own][-1] == "length"
        assert sum(len((each["logprobs"] or {"content": []})["content"]) for each in own) == 3


def counts(found: list[dict[str, Any]], index: int = 0) -> list[int]:
    """How many tokens the chunks of a choice say that it has."""
    own = [each["usage"] for each in found if [c["index"] for c in each["choices"]] == [index]]
    for each in own:
        assert each["prompt_tokens"] == 3
        assert each["total_tokens"] == 3 + each["completion_tokens"]
    return [each["completion_tokens"] for each in own]


@pytest.mark.parametrize("last", [False, True])
def test_every_chunk_may_have_the_usage_so_far(last: bool) -> None:
    options = {"continuous_usage_stats": True, "include_usage": last}
    body = {"messages": HELLO, "n": 2, "max_tokens": 3, "stream": True, "stream_options": options}
    got = chunks(post(PATH, body))
    assert counts(got) == counts(got, 1) == [0, 1, 2, 3]
    assert [each["usage"]["completion_tokens"] for each in got if not each["choices"]] == [6] * last
    got = chunks(post(PATH, body | {"logprobs": True, "n": 1}))
    assert counts(got) == [0, 1, 2, 3]


def test_a_chunk_of_a_call_has_the_usage_so_far() -> None:
    link = PlayedLink(saying("<tool_call>", '{"name": "now", "arguments": {}}', "</tool_call>"))
    body = {"messages": HELLO, "tools": [TOOL], "stream": True}
    got = chunks(post(PATH, body | {"stream_options": {"continuous_usage_stats": True}}, link))
    assert counts(got) == [0, 3, 3]


def test_what_the_request_says_reaches_the_node() -> None:
    link = PlayedLink()
    ask({"priority": -3, "cache_salt": "s", "user": "u", "seed": 7, "stop": "x"}, link)
    sent = link.asks[0]
    assert (sent.priority, sent.cache_salt, sent.tenant) == (-3, "s", "")
    assert (sent.params.seed, sent.params.stop) == (7, ("x",))


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": "none", "guided_regex": "a"}, "guided_regex"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_a_grammar_that_is_refused_has_the_name_that_it_was_given(
    extra: dict[str, Any], param: str
) -> None:
    link = PlayedLink(failing(InvalidRequest("too deep", param="grammar")))
    answer = post(PATH, {"messages": HELLO} | extra, link)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def saying(*texts: str) -> Script:
    """A script that says these, and stops."""

    async def script(
        link: PlayedLink, number: int, ask: Ask, on_reply: Callable[[Any], None]
    ) -> None:
        for place, text in enumerate(texts):
            end = End("stop", None, 3, len(texts)) if place == len(texts) - 1 else None
            on_reply(Delta(number, place, [place], text, end, prompt_tokens=0 if place else 3))

    return script


def test_parameters_that_are_no_object_are_refused() -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "array"}}}
    answer = post(PATH, {"messages": HELLO, "tools": [tool]})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "tools" and "'array'" in error["message"]


MARKED = (
    "<tool_call>",
    '{"name": "now", "arguments": {}}',
    "</tool_call>",
    "\n",
    "a:\n",
    "  ",
    "b",
)
BARE = ('{"name": "now", ', '"parameters": {}}')


def test_what_the_template_is_told_reaches_the_node() -> None:
    link = PlayedLink()
    thinking = {"chat_template_kwargs": {"enable_thinking": False}}
    going_on = {"continue_final_message": True, "add_generation_prompt": False}
    for extra, options in (
        ({}, TemplateOptions()),
        ({"add_generation_prompt": True, "continue_final_message": False}, None),
        (thinking, TemplateOptions(variables={"enable_thinking": False})),
        ({"continue_final_message": True}, TemplateOptions(continue_final_message=True)),
        (going_on, None),
    ):
        ask(extra, link)
        assert post("/tokenize", {"messages": HELLO} | extra, link).status_code == 200
        template = link.asks[-1].template
        assert link.templates[-1] == template
        assert options is None or template == options
        assert template.begins_answer == (not extra.get("continue_final_message"))


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
    ],
)
def test_what_the_template_cannot_be_told(extra: dict[str, Any], param: str) -> None:
    for path in (PATH, "/tokenize"):
        answer = post(path, {"messages": HELLO} | extra)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("style", "texts", "content", "calls"),
    [
        ("hermes", MARKED, "\na:\n  b", ["now"]),
        ("hermes", BARE, "".join(BARE), []),
        ("llama", BARE, None, ["now"]),
        ("llama", MARKED, "".join(MARKED), []),
    ],
)
def test_calls_are_read_in_the_form_of_the_model_alone(
    style: str, texts: tuple[str, ...], content: str | None, calls: list[str]
) -> None:
    link = PlayedLink(saying(*texts))
    link.welcome = msgspec.structs.replace(link.welcome, tool_style=style)
    (whole,) = ask({"tools": [TOOL]}, link)["choices"]
    assert whole["message"]["content"] == content
    assert [each["function"]["name"] for each in whole["message"].get("tool_calls", [])] == calls
    assert whole["finish_reason"] == ("tool_calls" if calls else "stop")
    got = chunks(post(PATH, {"messages": HELLO, "tools": [TOOL], "stream": True}, link))
    deltas = [each["choices"][0]["delta"] for each in got]
    assert "".join(each.get("content") or "" for each in deltas) == (content or "")
    begun = [call for each in deltas for call in each.get("tool_calls", []) if "id" in call]
    assert [call["function"]["name"] for call in begun] == calls
    assert got[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


@pytest.mark.parametrize(
    ("style", "texts"),
    [
        ("hermes", ("<tool_call>\n", '{"name": "now", "arguments": {', '"at": ')),
        ("llama", ('{"name": "now", ', '"parameters": {"at": ')),
    ],
)
def test_a_call_that_a_stop_string_cut_off_is_none_to_run(
    style: str, texts: tuple[str, ...]
) -> None:
    link = PlayedLink(saying(*texts))
    link.welcome = msgspec.structs.replace(link.welcome, tool_style=style)
    (whole,) = ask({"tools": [TOOL], "stop": "noon"}, link)["choices"]
    (call,) = whole["message"]["tool_calls"]
    assert (call["function"]["arguments"], whole["finish_reason"]) == ('{"at": ', "stop")
    body = {"messages": HELLO, "tools": [TOOL], "stop": "noon", "stream": True}
    assert chunks(post(PATH, body, link))[-1]["choices"][0]["finish_reason"] == "stop"
