"""What a body may hold: everything else is a 400 that names what is to blame."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo.gateway.decode import decode
from albireo.gateway.errors import HttpError
from albireo.gateway.requests import ChatRequest, CompletionRequest, DetokenizeRequest
from albireo.gateway.sampling import chat_params, completion_params
from albireo.ipc.params import PRIORITIES, SamplingDefaults, SamplingParams

from .played import PlayedLink, post

HELLO = [{"role": "user", "content": "hi"}]


def refusal(body: bytes | dict[str, Any], kind: Any = CompletionRequest) -> Any:
    payload = body if isinstance(body, bytes) else msgspec.json.encode(body)
    with pytest.raises(HttpError) as caught:
        found = decode(kind, payload)
        if kind is not DetokenizeRequest:
            completion_params(found) if kind is CompletionRequest else chat_params(found)
    assert caught.value.status == 400
    return caught.value.answer.error


def test_all_unknown_fields_are_named() -> None:
    error = refusal({"prompt": "a", "colour": 1, "shape": 2})
    assert error.message == "unknown parameters `colour`, `shape`"
    assert (error.param, error.code) == ("colour", "unknown_parameter")
    many = refusal({"prompt": "a"} | {f"x{i}": i for i in range(50)})
    assert "and 30 more" in many.message


def test_unsupported_fields_are_named_with_the_reason() -> None:
    functions = [{"name": "f"}]
    error = refusal({"messages": HELLO, "functions": functions, "best_of": 3}, ChatRequest)
    assert error.code == "unsupported_parameter"
    assert "`functions` is not supported: use tools" in error.message
    assert "`best_of` is not supported: ask for n answers" in error.message


@pytest.mark.parametrize(
    "field",
    ["guided_whitespace_pattern", "guided_decoding_backend", "audio", "suffix",
     "logits_processors", "best_of", "use_beam_search", "truncate_prompt_tokens"],
)  # fmt: skip
def test_documented_fields_that_are_not_served_say_so(field: str) -> None:
    error = refusal({"prompt": "a", field: 7})
    assert (error.param, error.code) == (field, "unsupported_parameter")


def test_values_that_ask_for_nothing_are_taken() -> None:
    body = {
        "messages": HELLO, "tools": None, "tool_choice": "none",
        "response_format": {"type": "text"},
        "best_of": 1, "store": False, "metadata": {}, "modalities": ["text"], "audio": None,
        "echo": False, "add_special_tokens": False, "include_reasoning": True,
        "use_beam_search": False, "length_penalty": 1.0, "temperature": None, "n": None,
        "logit_bias": None, "stop": None, "stream_options": None, "service_tier": "auto",
    }  # fmt: skip
    found = decode(ChatRequest, msgspec.json.encode(body))
    assert chat_params(found) == chat_params(ChatRequest(messages=found.messages))


@pytest.mark.parametrize("beside", [{}, {"store": False}])
def test_a_value_that_asks_for_something_stays_beside_one_that_does_not(beside: Any) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    body = {"messages": HELLO, "tools": [tool], "tool_choice": "none"}
    found = decode(ChatRequest, msgspec.json.encode(body | beside))
    assert found.tool_choice == "none"
    body = {"prompt": "a", "add_special_tokens": False, "echo": False}
    asked = decode(CompletionRequest, msgspec.json.encode(body | beside))
    assert asked.add_special_tokens is False


@pytest.mark.parametrize("value", [True, 0, "1", 2])
def test_a_neutral_value_of_another_type_is_none(value: Any) -> None:
    assert refusal({"prompt": "a", "best_of": value}).param == "best_of"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", "5"), ("max_tokens", 0), ("temperature", -1), ("temperature", 1e9),
        ("top_p", 0), ("n", 0), ("n", 1000), ("logprobs", 21), ("logprobs", True), ("seed", 2**70),
        ("stop", ["x"] * 17), ("stop", [""]), ("stop", {"a": 1}), ("logit_bias", {"a": 1}),
        ("logit_bias", {"5": 101}), ("stream", "yes"), ("presence_penalty", 3),
        ("repetition_penalty", 0), ("min_p", 2), ("top_k", -2), ("min_tokens", -1),
        ("stop_token_ids", [-1]), ("bad_words", [""]), ("allowed_token_ids", []),
        ("priority", 2**40), ("prompt_logprobs", -1), ("ignore_eos", 1), ("priority", -1001),
        ("max_tokens", 10**30), ("max_tokens", -(10**30)), ("min_tokens", 2**63),
        ("stop_token_ids", [2**31]), ("prompt", 10**30),
    ],
)  # fmt: skip
def test_a_value_out_of_its_range_names_its_field(field: str, value: Any) -> None:
    error = refusal({"prompt": "a", field: value})
    assert field in (error.param or "") + error.message


@pytest.mark.parametrize("number", [10**30, 2**31, -1, -(10**30)])
def test_a_token_id_that_cannot_be_one_is_named_by_its_place(number: int) -> None:
    assert refusal({"prompt": [1, number]}).param == "prompt[1]"
    assert refusal({"prompt": ["a", [number]]}).param == "prompt[1][0]"
    assert refusal({"tokens": [number]}, DetokenizeRequest).param == "tokens[0]"


@pytest.mark.parametrize(
    ("field", "place"),
    [
        ('"temperature": 1e999', "temperature"),
        ('"logit_bias": {"5": -1e999}', "logit_bias[...]"),
    ],
)
def test_a_number_that_no_float_holds_is_named(field: str, place: str) -> None:
    error = refusal(b'{"prompt": "a", %s}' % field.encode())
    assert error.param == place and "Number out of range" in error.message


def test_priorities_are_those_that_the_router_takes() -> None:
    low, high = PRIORITIES
    for priority in PRIORITIES:
        body = msgspec.json.encode({"prompt": "a", "priority": priority})
        assert decode(CompletionRequest, body).priority == priority
    for priority in (low - 1, high + 1):
        assert refusal({"prompt": "a", "priority": priority}).param == "priority"


@pytest.mark.parametrize("key", ["", "--5", "-5", "+5", " 5", "5\n", "1_0", "\u0665", "1" * 5000])
def test_a_key_of_logit_bias_that_is_no_token_id_is_named(key: str) -> None:
    error = refusal({"prompt": "a", "logit_bias": {"5": 1, key: 1, "b": 1}})
    assert error.param == "logit_bias"
    assert repr(key[:40]) in error.message and len(error.message) < 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff\xfe", b'{"prompt": "\xff"}', b'{"a":1}',
     b"[" * 100_000, b'{"prompt":' + b"[" * 5000, b"{}"],
)  # fmt: skip
def test_what_is_no_request_is_refused(body: bytes) -> None:
    refusal(body)


def test_a_missing_field_is_named() -> None:
    assert refusal({"model": "x"}).param == "prompt"
    assert refusal({"model": "x"}, ChatRequest).param == "messages"


def test_what_is_not_asked_for_is_as_the_model_advises() -> None:
    advised = SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05)
    found = decode(CompletionRequest, b'{"prompt": "a", "temperature": 0, "top_k": -1}')
    assert completion_params(found, advised) == SamplingParams(
        temperature=0.0, top_k=0, top_p=0.95, repetition_penalty=1.05
    )
    chat = decode(ChatRequest, b'{"messages": [{"role": "user", "content": "a"}], "top_p": 1}')
    assert chat_params(chat, advised) == SamplingParams(
        temperature=0.6, top_k=20, top_p=1.0, repetition_penalty=1.05
    )


def test_every_sampling_field_arrives() -> None:
    body = {
        "prompt": "a", "n": 2, "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 3,
        "stop": ["x", "y"], "presence_penalty": 0.1, "frequency_penalty": 0.2,
        "logit_bias": {"5": -100, "7": 1.5}, "top_k": -1, "min_p": 0.1, "repetition_penalty": 1.2,
        "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [4], "bad_words": ["no"],
        "include_stop_str_in_output": True, "skip_special_tokens": False,
        "allowed_token_ids": [1, 2], "prompt_logprobs": 3, "logprobs": 4,
    }  # fmt: skip
    params = completion_params(decode(CompletionRequest, msgspec.json.encode(body)))
    assert params.logit_bias == {5: -100.0, 7: 1.5}
    assert (params.stop, params.stop_token_ids, params.bad_words) == (("x", "y"), (4,), ("no",))
    assert (params.top_k, params.allowed_token_ids, params.logprobs) == (0, (1, 2), 4)
    for name in ("n", "max_tokens", "temperature", "top_p", "seed", "presence_penalty", "min_p",
                 "frequency_penalty", "repetition_penalty", "min_tokens", "ignore_eos",
                 "include_stop_str_in_output", "skip_special_tokens",
                 "prompt_logprobs"):  # fmt: skip
        assert getattr(params, name) == body[name]


def test_whole_numbers_may_be_written_as_floats() -> None:
    body = {"prompt": [1.0, 2, 3.0], "max_tokens": 16.0, "seed": 7.0, "temperature": 1}
    found = decode(CompletionRequest, msgspec.json.encode(body))
    assert (found.prompt, found.max_tokens, found.seed) == ([1, 2, 3], 16, 7)
    assert all(type(each) is int for each in (*found.prompt, found.max_tokens, found.seed))
    assert refusal({"prompt": "a", "max_tokens": 16.5}).param == "max_tokens"
    assert refusal({"prompt": "a", "n": 1e300}).param == "n"
    assert refusal({"prompt": [1.0, 2.5]}).param == "prompt[1]"


def test_combinations_that_mean_nothing_are_refused() -> None:
    assert refusal({"prompt": "a", "stream_options": {"include_usage": True}}).param == (
        "stream_options"
    )
    assert refusal({"prompt": "a", "stream": True, "prompt_logprobs": 1}).param == "prompt_logprobs"
    assert refusal({"messages": HELLO, "top_logprobs": 1}, ChatRequest).param == "top_logprobs"
    for name in ("include_obfuscation", "colour"):
        bad = {"prompt": "a", "stream": True, "stream_options": {name: True}}
        error = refusal(bad)
        assert (error.param, error.code) == (f"stream_options.{name}", "unknown_parameter")


def test_stream_options_that_ask_for_nothing_are_taken() -> None:
    neutral = {"include_obfuscation": False, "continuous_usage_stats": False}
    for more in (neutral, dict.fromkeys(neutral)):
        body = {"prompt": "a", "stream": True, "stream_options": {"include_usage": True} | more}
        found = decode(CompletionRequest, msgspec.json.encode(body))
        assert found.stream_options is not None and found.stream_options.include_usage
    odd = {"prompt": "a", "stream": True, "stream_options": {"include_obfuscation": 0}}
    assert refusal(odd).param == "stream_options.include_obfuscation"
    assert refusal({"prompt": "a", "stream": True, "stream_options": [neutral]}).param == (
        "stream_options"
    )


def test_only_what_is_null_is_dropped_from_a_message() -> None:
    schema = {"type": "object", "properties": {"a": {"const": None}}}
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "hi", "thinking": None}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
    }
    found = decode(ChatRequest, msgspec.json.encode(body))
    assert found.tools is not None and found.tools[0].function.parameters == schema
    for message in ({"role": None}, {"role": "user", "content": "x", "thinking": False}, None, "x"):
        error = refusal({"messages": [*HELLO, message]}, ChatRequest)
        assert (error.param or "").startswith("messages[1]")


_NAMES = [
    "prompt", "model", "n", "stop", "logit_bias", "max_tokens", "stream", "stream_options", "echo",
    "tools", "logprobs", "temperature", "seed", "suffix", "best_of", "messages", "extra", "",
]  # fmt: skip
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(_NAMES), _JSON, max_size=5), st.booleans())
def test_any_json_is_taken_or_refused(body: dict[str, Any], chat: bool) -> None:
    kind: Any = ChatRequest if chat else CompletionRequest
    import json

    try:
        found = decode(kind, json.dumps(body, allow_nan=False).encode())
        chat_params(found) if chat else completion_params(found)
    except ValueError as error:
        assert "Out of range float" in str(error)
    except HttpError as error:
        assert error.status == 400


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_taken_or_refused(body: bytes) -> None:
    try:
        decode(CompletionRequest, body)
    except HttpError as error:
        assert error.status == 400


def test_tokenize_and_detokenize() -> None:
    assert post("/tokenize", {"prompt": "ab"}).json() == {
        "count": 3, "max_model_len": 100, "tokens": [94, 97, 98],
    }  # fmt: skip
    assert post("/tokenize", {"prompt": "ab", "add_special_tokens": False}).json()["count"] == 2
    assert post("/tokenize", {"messages": HELLO}).json()["count"] == 3
    assert post("/detokenize", {"tokens": [97, 98]}).json() == {"prompt": "ab"}
    for body in ({}, {"prompt": "a", "messages": HELLO}, {"messages": HELLO, "model": "other"}):
        assert post("/tokenize", body).status_code in (400, 404)
    assert post("/detokenize", {"tokens": "a"}).status_code == 400


def test_an_unknown_model_is_404() -> None:
    response = post("/v1/completions", {"model": "gpt-4", "prompt": "a"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    link = PlayedLink()
    assert post("/v1/completions", {"model": "gpt-4", "prompt": "a"}, link).status_code == 404
    assert link.asks == []
