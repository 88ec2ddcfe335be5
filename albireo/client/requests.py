"""From what a caller writes to messages of the protocol, checked before they are sent.

The router checks everything again; checking here gives the error at the line
that caused it, without a round trip.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import msgspec

from albireo.ipc.grammars import Grammar
from albireo.ipc.params import ParameterError, SamplingParams
from albireo.ipc.protocol import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    Chat,
    ChatMessage,
    Generate,
    Hello,
    Tokenize,
)
from albireo.ipc.template import PLAIN, TemplateOptions
from albireo.ipc.tools import Tools

from .errors import InvalidRequest, TooLarge

Prompt = str | Sequence[int]
Messages = Sequence[ChatMessage | Mapping[str, Any]]


class SamplingOverrides(TypedDict, total=False):
    """Fields of SamplingParams as keywords; `stop` may be one string."""

    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int] | None
    bad_words: Sequence[str]
    n: int
    logprobs: int | None
    prompt_logprobs: int | None
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop_str_in_output: bool
    ignore_eos: bool
    skip_special_tokens: bool
    grammar: Grammar | None


class RequestKeywords(SamplingOverrides, total=False):
    """And those of Terms."""

    priority: int
    tenant: str
    cache_salt: str


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """Whose turn a request is, and who shares its prefixes: as in Generate and Chat."""

    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""


_DEFAULTS = SamplingParams()
_NO_TERMS = Terms()


def resolve_keywords(
    params: SamplingParams | None, keywords: Mapping[str, Any]
) -> tuple[SamplingParams, Terms]:
    """Sampling parameters and terms.  Raises as resolve_params."""
    own = {name: value for name, value in keywords.items() if name in Terms.__struct_fields__}
    chosen = resolve_params(params, {name: keywords[name] for name in keywords if name not in own})
    try:
        return chosen, msgspec.convert(own, Terms)
    except msgspec.ValidationError as error:
        raise InvalidRequest(
            f"priority, tenant or cache_salt has the wrong type: {error}"
        ) from None


def resolve_params(params: SamplingParams | None, overrides: Mapping[str, Any]) -> SamplingParams:
    """`params` with the keywords on top.

    Raises TypeError for a keyword that does not exist and for `params` of another
    type, InvalidRequest for a value of the wrong type or out of its range.
    """
    if params is not None and not isinstance(params, SamplingParams):
        raise TypeError(
            f"params must be a SamplingParams, not a {type(params).__name__}; single parameters "
            "go as keywords, such as max_tokens=3"
        )
    for name in overrides:
        if name not in SamplingParams.__struct_fields__:
            raise TypeError(f"there is no sampling parameter {name!r}")
    chosen = params or _DEFAULTS
    if overrides:
        chosen = msgspec.structs.replace(chosen, **overrides)
    if isinstance(chosen.stop, str):
        chosen = msgspec.structs.replace(chosen, stop=(chosen.stop,))
    if chosen is _DEFAULTS:
        return chosen
    try:
        checked = msgspec.convert(msgspec.to_builtins(chosen), SamplingParams)
        checked.validate()
    except ParameterError as error:
        raise InvalidRequest(str(error), param=error.param) from None
    except (msgspec.ValidationError, TypeError) as error:
        raise InvalidRequest(f"a sampling parameter has the wrong type: {error}") from None
    return checked


def generate_message(
    request_id: int, prompt: Prompt, params: SamplingParams, terms: Terms = _NO_TERMS
) -> Generate:
    """Text or token ids to a Generate."""
    text, ids = (prompt, None) if isinstance(prompt, str) else (None, token_ids(prompt))
    return Generate(
        id=request_id,
        prompt=text,
        prompt_ids=ids,
        params=params,
        priority=terms.priority,
        tenant=terms.tenant,
        cache_salt=terms.cache_salt,
    )


def chat_message(
    request_id: int,
    messages: Messages,
    params: SamplingParams,
    terms: Terms = _NO_TERMS,
    tools: Tools | None = None,
    template: TemplateOptions | None = None,
) -> Chat:
    """A conversation to a Chat.  Raises InvalidRequest for tools and options that cannot be."""
    if tools is not None and (fault := tools.fault()) is not None:
        raise InvalidRequest(f"tools: {fault}", param="tools")
    return Chat(
        id=request_id,
        messages=chat_messages(messages),
        params=params,
        priority=terms.priority,
        tenant=terms.tenant,
        cache_salt=terms.cache_salt,
        tools=tools,
        template=_checked(template),
    )


def tokenize_message(
    request_id: int, text: str | Messages, add_special_tokens: bool, tenant: str = "",
    template: TemplateOptions | None = None,
) -> Tokenize:  # fmt: skip
    """Text, or a conversation, to a Tokenize.  Raises InvalidRequest, as chat_message."""
    if isinstance(text, str):
        return Tokenize(
            id=request_id, text=text, add_special_tokens=add_special_tokens, tenant=tenant
        )
    return Tokenize(
        id=request_id, messages=chat_messages(text), tenant=tenant, template=_checked(template)
    )


def _checked(template: TemplateOptions | None) -> TemplateOptions:
    if template is None:
        return PLAIN
    if (fault := template.fault()) is not None:
        raise InvalidRequest(fault, param="template")
    return template


def chat_messages(messages: Messages) -> list[ChatMessage]:
    """Messages, or maps with `role` and `content`, to messages."""
    try:
        return [
            each if isinstance(each, ChatMessage) else msgspec.convert(dict(each), ChatMessage)
            for each in messages
        ]
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise InvalidRequest(
            f"a chat message must be a map of role and content, both text, and what "
            f"ChatMessage has besides: {error}",
            param="messages",
        ) from None


def token_ids(ids: Sequence[int]) -> list[int]:
    """Ids of any integer type to a list.  Raises TypeError for anything else."""
    if isinstance(ids, bytes | bytearray):
        raise TypeError("token ids must be integers, not bytes")
    if isinstance(ids, Mapping):
        raise TypeError("a prompt is a text, or token ids, without a dict around it")
    return [operator.index(each) for each in ids]


def answers_of(message: msgspec.Struct) -> int:
    """How many answers a request asks for, each with an end of its own."""
    return message.params.n if isinstance(message, Generate | Chat) else 1


def frame(message: msgspec.Struct, max_frame_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """A message as a frame.  Raises TooLarge, or InvalidRequest for what msgpack cannot carry."""
    try:
        payload = msgspec.msgpack.encode(message)
    except (OverflowError, UnicodeEncodeError, TypeError) as error:
        raise InvalidRequest(f"the request cannot be encoded: {error}") from None
    if len(payload) > max_frame_bytes:
        raise TooLarge(
            f"the request has {len(payload)} bytes; the node accepts {max_frame_bytes}: "
            "send less text at once"
        )
    return len(payload).to_bytes(4, "little") + payload


def hello(client_name: str, session: str, api_key: str) -> bytes:
    """The first frame of a connection."""
    return frame(
        Hello(protocol=PROTOCOL_VERSION, client=client_name, session=session, api_key=api_key)
    )
