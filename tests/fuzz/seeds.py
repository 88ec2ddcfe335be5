"""Valid messages with every field that there is, of clients and of HTTP bodies."""

from __future__ import annotations

from typing import Any

_PARAMS: dict[str, Any] = {
    "max_tokens": 3, "min_tokens": 1, "temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.01,
    "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": -0.1,
    "logit_bias": {7: 1.5}, "allowed_token_ids": [5, 6, 7], "bad_words": ["no"], "n": 2,
    "logprobs": 2, "prompt_logprobs": 1, "seed": 3, "stop": ["x", "yz"], "stop_token_ids": [9],
    "include_stop_str_in_output": True, "ignore_eos": True, "skip_special_tokens": False,
}  # fmt: skip
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
_TOOL = {"name": "f", "description": "d", "parameters": _SCHEMA}
_CALL = {"id": "c", "name": "f", "arguments": "{}"}

CLIENT: tuple[dict[str, Any], ...] = (
    {"type": "generate", "id": 1, "prompt_ids": [101, 102], "params": {"max_tokens": 2}},
    {"type": "generate", "id": 2, "prompt_ids": [5] * 20, "params": _PARAMS, "priority": -3,
     "tenant": "t", "cache_salt": "s"},
    {"type": "generate", "id": 3, "prompt": "abc", "params": {"grammar": {"regex": "a+"}}},
    {"type": "generate", "id": 4, "prompt": "é€😀",
     "params": {"grammar": {"json_schema": _SCHEMA}}},
    {"type": "chat", "id": 5, "messages": [{"role": "user", "content": "hi"}], "params": _PARAMS},
    {"type": "chat", "id": 6, "messages": [
        {"role": "system", "content": "s"},
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "content": "4", "tool_call_id": "c", "name": "f"}],
     "tools": {"functions": [_TOOL], "choice": "required", "parallel": False}},
    {"type": "cancel", "id": 1},
    {"type": "tokenize", "id": 7, "text": "abc", "add_special_tokens": False},
    {"type": "tokenize", "id": 8, "messages": [{"role": "user", "content": "hi"}],
     "template": {"variables": {"enable_thinking": False}, "add_generation_prompt": False}},
    {"type": "detokenize", "id": 9, "token_ids": [101], "skip_special_tokens": True},
    {"type": "models", "id": 10},
    {"type": "status", "id": 11},
    {"type": "hello", "protocol": 1, "client": "fuzz", "api_key": "k"},
)  # fmt: skip

OLD_HELLOS: tuple[dict[str, Any], ...] = (
    {"type": "hello", "protocol": 0},
    {"type": "hello"},
    {"type": "hello", "protocol": 2, "client": "future", "compression": ["zstd"]},
    {"type": "Hello", "version": "0.0.1"},
    {"hello": 1},
)

_HTTP_PARAMS: dict[str, Any] = {
    "max_tokens": 3, "n": 2, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"],
    "stream": True, "stream_options": {"include_usage": True}, "presence_penalty": 0.1,
    "frequency_penalty": 0.1, "logit_bias": {"7": 1}, "user": "u", "top_k": 4, "min_p": 0.1,
    "repetition_penalty": 1.1, "min_tokens": 1, "ignore_eos": True, "stop_token_ids": [9],
    "bad_words": ["no"], "allowed_token_ids": [5, 6], "prompt_logprobs": 1, "priority": 1,
    "cache_salt": "s", "request_id": "r",
}  # fmt: skip
_HTTP_TOOL = {"type": "function", "function": _TOOL}

HTTP: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "echo": True, "logprobs": 1, **_HTTP_PARAMS}),
    ("/v1/completions", {"prompt": ["a", "é€😀"], "guided_regex": "a+", "max_tokens": 2}),
    ("/v1/completions", {"prompt": [1, 2], "structured_outputs": {"choice": ["a"]},
                         "stream": True}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ("/v1/chat/completions", {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "4", "tool_call_id": "c"}],
        "tools": [_HTTP_TOOL], "tool_choice": "auto", "parallel_tool_calls": True,
        "logprobs": True, "top_logprobs": 2, **_HTTP_PARAMS}),
    ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 2,
        "response_format": {"type": "json_schema", "json_schema": {"schema": _SCHEMA}},
        "chat_template_kwargs": {"enable_thinking": False}}),
    ("/tokenize", {"prompt": "a", "add_special_tokens": False}),
    ("/tokenize", {"messages": [{"role": "user", "content": "hi"}],
                   "add_generation_prompt": False, "continue_final_message": True}),
    ("/detokenize", {"tokens": [97, 98]}),
)  # fmt: skip
