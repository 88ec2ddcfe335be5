"""Messages between clients and the router: protocol version 1.

One frame is a little-endian u32 length and that many bytes of msgpack: a map
whose "type" names the message.  docs/protocol.md describes the same for
implementers in other languages; keep the two together.  The first frame of a
client is Hello, the router's answer Welcome or Error.  `id` is chosen by the
client and must be unused among its requests in flight.
"""

from __future__ import annotations

from typing import Any

import msgspec

from .params import SamplingDefaults, SamplingParams
from .template import PLAIN, TemplateOptions
from .tools import ToolCall, Tools

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 8 * 1024 * 1024


class _Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: int


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello", tag_field="type"):
    """session: a secret of 22 to 128 characters that the client makes and uses for all its
    connections; who says it owns the requests.  "" = requests end with their connection.
    api_key: asked for over TCP alone.
    """

    protocol: int
    client: str = ""
    api_key: str = ""
    session: str = ""


class Generate(_Request, frozen=True, tag="generate", tag_field="type"):
    """Continue a prompt: exactly one of `prompt` (text) and `prompt_ids`.

    priority: lower goes first.  tenant: on whose behalf, for fairness; "" = the
        connection's own.  cache_salt: prefix blocks are shared only with
        requests that have the same one.
    """

    prompt: str | None = None
    prompt_ids: list[int] | None = None
    params: SamplingParams = SamplingParams()
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """tool_calls: of an assistant's message.  tool_call_id: of a tool's result.

    name: of who speaks, or of the tool; templates that know tools get it.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""


class Chat(_Request, frozen=True, tag="chat", tag_field="type"):
    """Answer a conversation, through the model's chat template; tools: that it may call."""

    messages: list[ChatMessage]
    params: SamplingParams = SamplingParams()
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    tools: Tools | None = None
    template: TemplateOptions = PLAIN


class Cancel(_Request, frozen=True, tag="cancel", tag_field="type"):
    """End the generate or chat request `id`: its last Delta has reason "cancelled".

    Not an error when `id` has ended meanwhile: then there is no further answer.
    """


class Have(msgspec.Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """What a client has of an answer whose end has not come: how many tokens, and how many
    prompt logprobs."""

    choice: int
    tokens: int
    prompt_logprobs: int = 0


class Resume(_Request, frozen=True, tag="resume", tag_field="type"):
    """Go on with request `id`, which an earlier connection of the session asked.

    have: of each answer that has not ended for the client.
    """

    have: list[Have]


class Tokenize(_Request, frozen=True, tag="tokenize", tag_field="type"):
    """Text, or a conversation, to token ids.  tenant: as in Generate.  template: as in Chat."""

    text: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True
    tenant: str = ""
    template: TemplateOptions = PLAIN


class Detokenize(_Request, frozen=True, tag="detokenize", tag_field="type"):
    """Token ids to text.  tenant: as in Generate."""

    token_ids: list[int]
    skip_special_tokens: bool = False
    tenant: str = ""


class Models(_Request, frozen=True, tag="models", tag_field="type"):
    pass


class Status(_Request, frozen=True, tag="status", tag_field="type"):
    pass


ClientMessage = Hello | Generate | Chat | Resume | Cancel | Tokenize | Detokenize | Models | Status


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome", tag_field="type"):
    """What the node says of itself.

    resume_s: so long the requests of a session wait for its next connection; 0 = they do not.
    strips_first_space: an answer's text lacks the space that its first token begins with.
    special_ids: tokens whose text `skip_special_tokens` leaves out.
    tool_style: the form of tool calls in answers, "hermes" or "llama" (docs/protocol.md, Tools).
    sampling_defaults: what the model's makers advise; requests have it only as their clients say.
    """

    protocol: int
    version: str
    node: str
    model: str
    max_model_len: int
    vocab_size: int
    max_frame_bytes: int
    resume_s: float = 0.0
    strips_first_space: bool = False
    special_ids: tuple[int, ...] = ()
    tool_style: str = "hermes"
    sampling_defaults: SamplingDefaults = SamplingDefaults()


class End(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The last word on a request.

    finish_reason: "stop", "length" or "cancelled".
    stop_reason: the stop string or token id that ended it, where one did.
    """

    finish_reason: str
    stop_reason: str | int | None
    prompt_tokens: int
    completion_tokens: int


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A token and its natural log-probability; rank: 1 = the most probable.

    text: the token's bytes, which may be part of a character.
    """

    token_id: int
    logprob: float
    rank: int
    text: bytes


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Of one position: the token that stands there, and the best ones, best first."""

    token: TokenLogprob
    top: list[TokenLogprob]


class Delta(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """New tokens of one request: (id, index of the first token, ids, text, end or nil, ...).

    Text may lag behind the ids: an incomplete character, or a possible stop
    string, is held back until it is decided.
    choice: which of the n answers.  logprobs: one for each of token_ids, where
    asked for.  prompt_logprobs: of the prompt's tokens from the second on,
    ahead of choice 0's first token, in one delta or several.  prompt_tokens: of
    the prompt; 0 where index is not.
    With n > 1 each choice has its own end.
    """

    id: int
    index: int
    token_ids: list[int]
    text: str
    end: End | None = None
    choice: int = 0
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs] | None = None
    prompt_tokens: int = 0


class Deltas(msgspec.Struct, frozen=True, kw_only=True, tag="deltas", tag_field="type"):
    items: list[Delta]


class Tokens(msgspec.Struct, frozen=True, kw_only=True, tag="tokens", tag_field="type"):
    id: int
    token_ids: list[int]


class Text(msgspec.Struct, frozen=True, kw_only=True, tag="text", tag_field="type"):
    id: int
    text: str


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    max_model_len: int
    vocab_size: int
    architecture: str


class ModelList(msgspec.Struct, frozen=True, kw_only=True, tag="model_list", tag_field="type"):
    id: int
    models: list[ModelCard]


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True, tag="node_status", tag_field="type"):
    """`status`: the tree that `albireo node status --json` prints (see docs/protocol.md)."""

    id: int
    status: dict[str, Any]


class Error(msgspec.Struct, frozen=True, kw_only=True, tag="error", tag_field="type"):
    """The end of the request `id`, which has failed.

    Without `id` it answers a message that cannot be told to be a request, or
    one whose `id` is in use; "protocol", "too_large", "unauthenticated" and
    "unavailable" then end the connection.

    code: "invalid_request" (of `param`, when one is to blame), "too_long",
        "too_large", "protocol", "unauthenticated", "queue_full", "unavailable",
        "group_failed", "lost", "internal".
    retry: the same request may succeed later.
    """

    id: int | None
    code: str
    message: str
    param: str | None = None
    retry: bool = False


RouterMessage = Welcome | Deltas | Tokens | Text | ModelList | NodeStatus | Error
