"""Messages between actors: msgspec Structs in msgpack, over ZeroMQ (ipc/link.py).

    supervisor ──┐
    tokenizer ───┤  Spokes of the router's Hub
    detokenizer ─┘
    scheduler ───── Spoke of its detokenizer's Hub

Outputs alone, the tokens of a step, go from detokenizer to router by a socket of their own
(ipc/output_lane.py).

A request has two numbers: the client's `id` on its connection, and `request`,
a positive int32 that the router gives to each attempt and that all actors of
a group use.  An answer to an attempt that the router has given up is dropped
there by its number.
"""

from __future__ import annotations

import msgspec

from .grammars import Grammar
from .protocol import ChatMessage, End, Logprobs
from .template import PLAIN, TemplateOptions
from .tools import Tools


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    pass


# ------------------------------------------------------------ any actor -> its hub
class Joined(_Message, frozen=True):
    """First message of a Spoke: who it is.  `incarnation` grows with each restart."""

    role: str
    group: int
    incarnation: int
    pid: int


def detokenizer_identity(group: int, incarnation: int) -> str:
    """By which the router knows the detokenizer of a group."""
    return f"g{group}.{incarnation}"


# ------------------------------------------------------------ router <-> tokenizer
class EncodeText(_Message, frozen=True):
    """words: texts to encode as well, each as it stands at a text's beginning and inside it.

    grammar: to be compiled as well.
    context: tokens that the text and one more have to fit into; 0 = it need not fit.
    """

    key: int
    text: str
    add_special_tokens: bool
    words: tuple[str, ...] = ()
    grammar: Grammar | None = None
    context: int = 0


class EncodeChat(_Message, frozen=True):
    """words, grammar, context: as in EncodeText."""

    key: int
    messages: list[ChatMessage]
    words: tuple[str, ...] = ()
    grammar: Grammar | None = None
    tools: Tools | None = None
    context: int = 0
    template: TemplateOptions = PLAIN


class DecodeIds(_Message, frozen=True):
    key: int
    token_ids: list[int]
    skip_special_tokens: bool


class Encoded(_Message, frozen=True):
    """words: token ids of the words, up to two ways of writing each.

    grammar: as in Submit.
    """

    key: int
    token_ids: list[int]
    words: tuple[tuple[int, ...], ...] = ()
    grammar: str = ""


class Decoded(_Message, frozen=True):
    key: int
    text: str


class TextFailed(_Message, frozen=True):
    """The tokenizer could not do it: a template's error, say.  The rest as in protocol.Error."""

    key: int
    code: str
    message: str
    param: str | None = None


# ------------------------------------------------------------ router -> detokenizer -> scheduler
class Submit(_Message, frozen=True):
    """A request with every value resolved: nothing is optional any more.

    stop_token_ids holds the model's end tokens too, unless they are ignored.
    `seed` is 64 bits, signed.  Lengths are within the model's context.
    resumed: so many tokens at the end of prompt_ids are output of an earlier
        attempt; max_tokens and min_tokens count them, the client has their text.
    logprobs, prompt_logprobs: -1 = none, else how many best tokens to report.
    bad_words: token ids of each; allowed_token_ids: empty = all.
    grammar: what matchers are made of (workers/grammar/), known to compile; "" = free text.
    priority: lower goes first.  tenant: who is asking, for fairness among them.
    weight: of the tenant's turns against those of others.
    cache_salt: only requests with the same one share prefix blocks.
    arrived_s: when the router got it, CLOCK_MONOTONIC in seconds; 0 = not known.
    """

    request: int
    prompt_ids: list[int]
    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    include_stop: bool
    skip_special_tokens: bool
    resumed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    logprobs: int = -1
    prompt_logprobs: int = -1
    priority: int = 0
    tenant: str = ""
    weight: float = 1.0
    cache_salt: str = ""
    grammar: str = ""
    arrived_s: float = 0.0


class Abort(_Message, frozen=True):
    """Give up a request: no answer is wanted, blocks and slot are to be freed."""

    request: int


class Reset(_Message, frozen=True):
    """Give up every request: the router knows none of them.  It is a new one, or what was said
    lately may not have come.  The answer is a Joined."""


class Processed(_Message, frozen=True):
    """Detokenizer -> scheduler: the output of this step has been dealt with.

    Sent without asynchronous output processing only (`--no-async-output`).
    """

    step: int


class Credit(_Message, frozen=True):
    """The router has dealt with this many Output batches more."""

    batches: int


# ------------------------------------------------------------ scheduler -> detokenizer -> router
class Piece(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """New tokens of one request, as protocol.Delta with the group's number."""

    request: int
    index: int
    token_ids: list[int]
    text: str
    end: End | None
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs] | None = None


class Output(_Message, frozen=True):
    """Everything new since the last Output; costs one credit.

    more: rows of the same step follow in another one.
    """

    pieces: list[Piece]
    more: bool = False


class Refused(_Message, frozen=True):
    """A request ends with an error: it can never fit, its logits are not finite, ..."""

    request: int
    code: str
    message: str


class SchedulerStats(_Message, frozen=True):
    """State of a group's scheduler.  Counters grow from the group's start.

    queue_counts, queue_sum_s: histogram of the times until a first slot, by WHOLE_REQUEST_S.
    """

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    preemptions: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    finished: int
    step_ms_mean: float
    forward_ms_mean: float
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    waiting_by_priority: dict[int, int] = {}
    queue_counts: list[int] = []
    queue_sum_s: float = 0.0


class GroupStats(_Message, frozen=True):
    """SchedulerStats on its way to the router, about once a second and when idle begins."""

    group: int
    scheduler: SchedulerStats


# ------------------------------------------------------------ supervisor <-> router
class ActorInfo(msgspec.Struct, frozen=True):
    """One process of the node, for `node status`."""

    name: str
    role: str
    group: int
    pid: int
    state: str
    restarts: int
    threads: int


class Topology(_Message, frozen=True):
    """The whole node as the supervisor sees it; sent at every change.

    groups: state of each group by number: "starting", "ready", "draining",
    "restarting", "stopped", "failed".
    incarnations: of each group by number, so that a new router can address it.
    num_blocks: KV blocks of each group by number: as many as it had when it was ready last, and
        before that as many as were planned.
    """

    actors: list[ActorInfo]
    groups: list[str]
    incarnations: list[int] = []
    num_blocks: list[int] = []


class GroupDown(_Message, frozen=True):
    """A group has died: its requests go on elsewhere; `reason` is for the user.

    planned: it was ended on request, which says nothing about what it served.
    detected: when it was found out, by time.monotonic(), which is the same in all processes.
    """

    group: int
    incarnation: int
    reason: str
    planned: bool = False
    detected: float = 0.0


class TokenizerDown(_Message, frozen=True):
    incarnation: int


class Drain(_Message, frozen=True):
    """Say Drained when no request is left, or the time is over.

    group: -1 = the node, which takes no new requests from now on.  A group that
        is drained gets none because of its state.
    number: of this drain, for the answer.
    """

    timeout_s: float
    group: int
    number: int


class Drained(_Message, frozen=True):
    """number: the Drain's."""

    unfinished: int
    number: int


ToTokenizer = EncodeText | EncodeChat | DecodeIds
ToDetokenizer = Submit | Abort | Reset | Credit
ToScheduler = Submit | Abort | Reset | Processed
FromScheduler = Joined | Refused | SchedulerStats
ToRouter = (
    Joined
    | Encoded
    | Decoded
    | TextFailed
    | Refused
    | GroupStats
    | Topology
    | GroupDown
    | TokenizerDown
    | Drain
)
ToSupervisor = Drained
