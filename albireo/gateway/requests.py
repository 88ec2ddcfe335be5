"""Bodies of requests, as OpenAI and vLLM name their fields.

A field that is not here is refused (decode.py), so nothing is accepted and
ignored; but `user`, `safety_identifier` and `prompt_cache_key`, which OpenAI
defines as hints without an effect on the answer, and what clients add to the
parts of a message and to calls that were made before (`cache_control`,
`index`).  None is a field's default everywhere: clients send null for what they
do not set.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from .ranges import (
    AllowedTokens,
    AtLeastOne,
    BadWords,
    Biases,
    Choices,
    MaxTokens,
    MaxTokensOrNone,
    MinP,
    MinTokens,
    NumLogprobs,
    Penalty,
    Priority,
    Prompts,
    Repetition,
    Seed,
    StopStrings,
    StopTokens,
    Temperature,
    TokenId,
    TopK,
    TopP,
)

_Name = Annotated[str, msgspec.Meta(max_length=256)]


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """include_usage: a last chunk without choices carries the usage.

    continuous_usage_stats: vLLM's; every other chunk has its choice's usage so far.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The schema always holds, whatever `strict` says; name and description are for the reader."""

    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the answer has to look like, in OpenAI's words."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The same in vLLM's newer words: exactly one of these."""

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class _Generation(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What completions and chat have in common; see ipc/params.py for ranges and meaning.

    top_k: -1 is the same as 0, all tokens.
    response_format, structured_outputs, guided_*: see formats.py; at most one.
    priority: lower goes first.  cache_salt: prefixes are shared only with requests
        that have the same.  request_id: instead of the header X-Request-Id.
    """

    model: str | None = None
    max_tokens: MaxTokens | None = None
    n: Choices | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: StopStrings | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    user: str | None = None
    response_format: ResponseFormat | None = None
    # vLLM's
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: Repetition | None = None
    min_tokens: MinTokens | None = None
    ignore_eos: bool | None = None
    stop_token_ids: StopTokens | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    bad_words: BadWords | None = None
    allowed_token_ids: AllowedTokens | None = None
    prompt_logprobs: NumLogprobs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: Priority | None = None
    cache_salt: _Name | None = None
    request_id: _Name | None = None


class CompletionRequest(_Generation, kw_only=True, forbid_unknown_fields=True):
    """/v1/completions.

    prompt: a text, texts, token ids, or lists of token ids.
    max_tokens: 0 with `echo` alone.
    echo: the answer begins with the prompt.
    logprobs: of each token, and of so many best ones.
    add_special_tokens: to a text, those that the model's tokenizer adds.
    """

    prompt: Prompts
    max_tokens: MaxTokensOrNone | None = None
    echo: bool | None = None
    logprobs: NumLogprobs | None = None
    add_special_tokens: bool | None = None


class FunctionTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """strict: arguments fit the parameters always, whatever it says."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolOffer(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A function that the model may call."""

    type: Literal["function"]
    function: FunctionTool


class ChosenFunction(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: str


class ToolChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The function that has to be called."""

    type: Literal["function"]
    function: ChosenFunction


class CalledBefore(msgspec.Struct, kw_only=True):
    """arguments: JSON text."""

    name: str
    arguments: str


class CallBefore(msgspec.Struct, kw_only=True):
    """A call in a message of the conversation."""

    id: str
    function: CalledBefore
    type: Literal["function"] = "function"


class ContentPart(msgspec.Struct, kw_only=True):
    """A part of a message; types "text" and "refusal" are the only ones that are served."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One message of a conversation; parts of its content are joined by line ends.

    role: system, user, assistant, tool, or another that the model's template knows;
        "developer" is OpenAI's newer name for system.
    content: what an assistant says may be null.
    refusal: what it said instead, or besides: one part more of its text.
    name: of who speaks, or of the function: for templates that know tools and use it.
    tool_call_id: of a tool's message.  tool_calls: of an assistant's.
    """

    role: _Name
    content: str | list[ContentPart] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    refusal: str | None = None
    audio: None = None
    function_call: None = None
    tool_calls: list[CallBefore] | None = None
    annotations: list[Any] | None = None


class ChatRequest(_Generation, kw_only=True, forbid_unknown_fields=True):
    """/v1/chat/completions.

    max_completion_tokens: the newer name of max_tokens.
    logprobs: report them; top_logprobs: of so many best tokens besides, 0 to 20.
    chat_template_kwargs: variables for the chat template.
    add_generation_prompt, continue_final_message: as in ipc/template.py.
    """

    messages: Annotated[list[Message], AtLeastOne]
    max_completion_tokens: MaxTokens | None = None
    tools: list[ToolOffer] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """/tokenize: a text, or a conversation through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """/detokenize: token ids to text, special tokens included."""

    model: str | None = None
    tokens: list[TokenId]
