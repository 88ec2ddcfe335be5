"""Bytes of a body to a request, or a 400 that names every field that is to blame."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from .errors import HttpError, invalid
from .requests import ChatRequest, CompletionRequest, DetokenizeRequest, Message, TokenizeRequest

_T = TypeVar("_T", CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)

_MAX_QUOTED_CHARS = 300
_MAX_NAMED = 20
_EXACT = 2**53
"""Up to it every integer is a float of its own."""

_TOOLS = "use tools and tool_choice"
_CHAT_ONLY = "tools belong to conversations: use /v1/chat/completions"
_TEMPLATE = "a prompt goes through no template: use /v1/chat/completions"
_BOUNDED = "there is one kind of matcher, and white space in JSON is bounded"
_TEXT_ONLY = "the model reads and writes text only"

_UNSUPPORTED: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "tools": (_CHAT_ONLY, ([],)),
    "tool_choice": (_CHAT_ONLY, ("none", "auto")),
    "parallel_tool_calls": (_CHAT_ONLY, ()),
    "functions": (_TOOLS, ([],)),
    "function_call": (_TOOLS, ("none", "auto")),
    "guided_decoding_backend": (_BOUNDED, ()),
    "guided_whitespace_pattern": (_BOUNDED, ()),
    "audio": (_TEXT_ONLY, ()),
    "modalities": (_TEXT_ONLY, (["text"],)),
    "mm_processor_kwargs": (_TEXT_ONLY, ({},)),
    "prompt_embeds": (_TEXT_ONLY, ()),
    "logits_processors": ("code from a request is never run", ([],)),
    "chat_template": ("the template is chosen when the node starts", ()),
    "chat_template_kwargs": (_TEMPLATE, ({},)),
    "documents": ("write them into the messages", ([],)),
    "add_generation_prompt": (_TEMPLATE, ()),
    "continue_final_message": (_TEMPLATE, (False,)),
    "echo": ("the answer has what is new", (False,)),
    "add_special_tokens": ("the chat template has its own", (False,)),
    "include_reasoning": ("all that the model says is the answer", (True,)),
    "best_of": ("ask for n answers and choose", (1,)),
    "use_beam_search": ("there is no beam search", (False,)),
    "length_penalty": ("there is no beam search", (1, 1.0)),
    "early_stopping": ("there is no beam search", (False,)),
    "suffix": ("there is no insertion", ("",)),
    "prediction": ("there are no predicted outputs", ()),
    "web_search_options": ("there is no web search", ()),
    "reasoning_effort": ("the model's template decides", ()),
    "verbosity": ("the model's template decides", ()),
    "service_tier": ("use priority", ("auto", "default")),
    "store": ("nothing is stored", (False,)),
    "metadata": ("nothing is stored", ({},)),
    "truncate_prompt_tokens": ("shorten the prompt", ()),
    "spaces_between_special_tokens": ("the tokenizer decides", (True,)),
    "return_token_strs": ("ask /detokenize for each token", (False,)),
    "return_tokens_as_token_ids": ("logprobs give texts and bytes", (False,)),
    "return_token_ids": ("ask /tokenize", (False,)),
    "kv_transfer_params": ("there is no transfer of KV blocks", ()),
    "vllm_xargs": ("there are no further arguments", ({},)),
}
"""Fields that OpenAI or vLLM define and that are not served: why, and the values, besides
null, that ask for nothing."""

_STREAM_OPTIONS = {"include_obfuscation": (False,)}
"""The same of stream_options."""

_decoders = {
    kind: msgspec.json.Decoder(kind)
    for kind in (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
}
_decode_map = msgspec.json.Decoder(dict[str, Any]).decode


def decode(kind: type[_T], body: bytes) -> _T:
    """Raises HttpError (400)."""
    try:
        try:
            return _decoders[kind].decode(body)  # type: ignore[return-value]
        except msgspec.ValidationError as first:
            try:
                fields = _decode_map(body)
            except msgspec.ValidationError:
                raise first from None  # It knows the place, by its name.
            _drop_neutral(kind, fields)
            _refuse_strange(kind, fields)
            try:
                return msgspec.convert(fields, kind)
            except msgspec.ValidationError:
                return msgspec.convert(_whole_numbers(fields), kind)
    except msgspec.ValidationError as error:
        raise _explain(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"the body is not valid JSON: {_quote(error)}") from None
    except RecursionError:
        raise invalid("the body is nested too deeply") from None


def _whole_numbers(value: Any) -> Any:
    """16.0 as 16: to JSON Schema they are the same integer, and some clients know floats alone."""
    if isinstance(value, dict):
        return {name: _whole_numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(each) for each in value]
    exact = isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT
    return int(value) if exact else value


def _drop_neutral(kind: type[msgspec.Struct], fields: dict[str, Any]) -> None:
    """Takes out what is not served but asks for nothing."""
    strange = _UNSUPPORTED.keys() - set(kind.__struct_fields__)
    _drop(fields, {name: _UNSUPPORTED[name][1] for name in strange})
    options, messages = fields.get("stream_options"), fields.get("messages")
    if isinstance(options, dict):
        _drop(options, _STREAM_OPTIONS)
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            # What another server answered comes back with all the nulls that it has.
            _drop(message, dict.fromkeys(message.keys() - set(Message.__struct_fields__), ()))


def _drop(fields: dict[str, Any], names: Mapping[str, tuple[Any, ...]]) -> None:
    """Takes out those of the names whose value is null or one of the given."""
    for name in fields.keys() & names.keys():
        value = fields[name]
        if value is None or any(
            type(value) is type(each) and value == each for each in names[name]
        ):
            del fields[name]


def _refuse_strange(kind: type[msgspec.Struct], fields: dict[str, Any]) -> None:
    """Raises HttpError when there are fields that `kind` does not have; it names them all."""
    strange = [name for name in fields if name not in kind.__struct_fields__]
    if not strange:
        return
    reasons: dict[str, list[str]] = {}
    for name in strange[:_MAX_NAMED]:
        reason = _UNSUPPORTED[name][0] if name in _UNSUPPORTED else ""
        reasons.setdefault(reason, []).append(f"`{name[:64]}`")
    texts = []
    for reason, names in reasons.items():
        plural = len(names) > 1
        what = ", ".join(names)
        if reason:
            texts.append(f"{what} {'are' if plural else 'is'} not supported: {reason}")
        else:
            texts.append(f"unknown parameter{'s' if plural else ''} {what}")
    if len(strange) > _MAX_NAMED:
        texts.append(f"and {len(strange) - _MAX_NAMED} more")
    known = all(name in _UNSUPPORTED for name in strange)
    raise invalid(
        "; ".join(texts),
        param=strange[0][:64],
        code="unsupported_parameter" if known else "unknown_parameter",
    )


def _explain(error: msgspec.ValidationError) -> HttpError:
    text = _quote(error)
    field = re.search(r"unknown field `([^`]+)`", text)
    place = re.search(r"at `\$\.?([^`]*)`", text) or re.search(r"required field `([^`]+)`", text)
    at = place[1] if place else ""
    if field:
        at = f"{at}.{field[1]}".lstrip(".")
        return invalid(f"unknown parameter `{at}`", at or None, "unknown_parameter")
    return invalid(text, at or None)


def _quote(error: Exception) -> str:
    return str(error)[:_MAX_QUOTED_CHARS]
