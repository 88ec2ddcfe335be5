"""Bodies of answers, whole ones and chunks of a stream; the OpenAPI document describes them."""

from __future__ import annotations

import msgspec

from .logprobs import ChatLogprobs, CompletionLogprobs, PromptLogprobs


class Usage(msgspec.Struct, kw_only=True):
    """A prompt counts once, however many answers it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(msgspec.Struct, kw_only=True):
    """index: prompt * n + i.  stop_reason: the stop string or token id that ended it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(msgspec.Struct, kw_only=True):
    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None


class CompletionChunkChoice(msgspec.Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None


class CompletionChunk(msgspec.Struct, kw_only=True):
    """An event of a stream; the last one may have no choice but the usage."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None


class CalledFunction(msgspec.Struct, kw_only=True):
    """arguments: JSON text; cut off where the answer was."""

    name: str
    arguments: str


class ToolCallAnswer(msgspec.Struct, kw_only=True):
    id: str
    type: str = "function"
    function: CalledFunction


class AnswerMessage(msgspec.Struct, kw_only=True):
    """content: null where there is nothing but calls."""

    role: str = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCallAnswer] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None
    prompt_logprobs: PromptLogprobs | None = None


class CalledFunctionDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """id, type and name are in the first piece of a call, arguments come after."""

    index: int
    id: str | None = None
    type: str | None = None
    function: CalledFunctionDelta | None = None


class MessageDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """role: in the first chunk of a choice only."""

    role: str | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None


class ChatChunk(msgspec.Struct, kw_only=True):
    """An event of a stream; the last one may have no choice but the usage."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Model(msgspec.Struct, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "albireo"
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[Model]


class Tokenized(msgspec.Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]


class Detokenized(msgspec.Struct, kw_only=True):
    prompt: str


class Version(msgspec.Struct, kw_only=True):
    version: str
