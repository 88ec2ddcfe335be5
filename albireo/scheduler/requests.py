"""A request as the scheduler sees it, from its submission to its end.

It is an object while it waits, and when something happens to it; what a step
of plain decodes needs lies in arrays (sequences.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from albireo.ipc.messages import Submit
from albireo.ipc.plan import (
    EDIT_ALLOW,
    EDIT_BAD_WORD,
    EDIT_BAN_UNTIL,
    EDIT_BIAS,
    EDIT_WORDS,
    TAKE_ALLOWS,
    TAKE_COUNTS,
    TAKE_EDITS,
    TAKE_FLAGS,
    TAKE_FREQUENCY,
    TAKE_GRAMMAR,
    TAKE_LOGPROBS,
    TAKE_MIN_P,
    TAKE_PRESENCE,
    TAKE_PROMPT_LEN,
    TAKE_REPETITION,
    TAKE_REQUEST,
    TAKE_SEED_HI,
    TAKE_SEED_LO,
    TAKE_TEMPERATURE,
    TAKE_TOP_K,
    TAKE_TOP_P,
    TAKE_UNTIL,
    TAKE_WORDS,
    Int32Array,
    split64,
)

AGING_STEPS = 2000
"""A request that has waited so many steps is worth what one of the next lower priority number is
when it arrives: a low priority waits long, not for ever."""

_MOST_PRIORITY = 2**31
_NO_EDITS = np.empty((0, EDIT_WORDS), dtype=np.int32)


class Share(NamedTuple):
    """What requests have in common that wait for each other first come, first served.

    weight: of the tenant, against those of others of the priority.
    """

    priority: int
    tenant: str
    weight: float


@dataclass(slots=True, eq=False)
class Request:
    """What is known of it.

    arrival: grows with each submission.
    share: whose turns it takes.
    rank: the step it came in, later by AGING_STEPS for each step of priority;
        who has the lower rank, and then the earlier arrival, is more important.
    tokens: int32, prompt and output; complete only while it waits.
    prompt_len: without the output of an earlier attempt that came with it.
    min_len, end_len: tokens (prompt included) from which stop tokens count, and
        at which it ends.
    take, edits: the plan's words for it; the slot is filled in when it gets one.
    grammar: its text, UTF-8.
    unscored: the first prompt position whose log-probabilities are still
        wanted; prompt_len - 1 when none is.
    names: of its full blocks, as in prefix_cache.extend_names; made when it
        comes to the queue's head.
    host, swapped: host blocks that hold its first `swapped` positions.
    slot: -1 while it has none.
    """

    number: int
    arrival: int
    rank: int
    share: Share
    cache_salt: str
    tokens: Int32Array
    prompt_len: int
    min_len: int
    end_len: int
    stop_ids: frozenset[int]
    take: Int32Array
    edits: Int32Array
    unscored: int
    grammar: bytes = b""
    names: list[bytes] = field(default_factory=list)
    host: Int32Array | None = None
    swapped: int = 0
    slot: int = -1
    preemptions: int = 0

    @property
    def priority(self) -> int:
        return self.share.priority

    @property
    def tenant(self) -> str:
        return self.share.tenant

    @property
    def order(self) -> tuple[int, int]:
        """Smaller = more important."""
        return self.rank, self.arrival

    @property
    def counts(self) -> bool:
        """Whether the workers have to be told all of its tokens."""
        return bool(self.take[TAKE_FLAGS] & (TAKE_COUNTS | TAKE_GRAMMAR))

    @property
    def scores(self) -> bool:
        """Whether log-probabilities of its prompt are still to come."""
        return self.unscored < self.prompt_len - 1


def new_request(submit: Submit, arrival: int, step: int) -> Request:
    """The scheduler's view of a submission that comes before `step` is planned."""
    prompt_len = len(submit.prompt_ids) - submit.resumed
    edits = _edits(submit)
    take = np.zeros(TAKE_WORDS, dtype=np.int32)
    take[TAKE_REQUEST] = submit.request
    take[TAKE_SEED_LO], take[TAKE_SEED_HI] = split64(submit.seed)
    floats = take.view(np.float32)
    floats[TAKE_TEMPERATURE] = submit.temperature
    floats[TAKE_TOP_P] = submit.top_p
    floats[TAKE_MIN_P] = submit.min_p
    floats[TAKE_REPETITION] = submit.repetition_penalty
    floats[TAKE_PRESENCE] = submit.presence_penalty
    floats[TAKE_FREQUENCY] = submit.frequency_penalty
    take[TAKE_TOP_K] = submit.top_k
    take[TAKE_PROMPT_LEN] = prompt_len
    take[TAKE_FLAGS] = _flags(submit, edits)
    take[TAKE_UNTIL] = prompt_len + submit.min_tokens
    take[TAKE_LOGPROBS] = 1 + submit.logprobs
    return Request(
        number=submit.request,
        arrival=arrival,
        rank=step + AGING_STEPS * max(-_MOST_PRIORITY, min(submit.priority, _MOST_PRIORITY)),
        share=Share(submit.priority, submit.tenant, submit.weight),
        cache_salt=submit.cache_salt,
        tokens=np.array(submit.prompt_ids, dtype=np.int32),
        prompt_len=prompt_len,
        min_len=prompt_len + submit.min_tokens,
        end_len=prompt_len + submit.max_tokens,
        stop_ids=frozenset(submit.stop_token_ids),
        take=take,
        edits=edits,
        unscored=0 if submit.prompt_logprobs >= 0 else prompt_len - 1,
        grammar=submit.grammar.encode(),
    )


def _flags(submit: Submit, edits: Int32Array) -> int:
    flags = TAKE_EDITS if len(edits) else 0
    if submit.allowed_token_ids:
        flags |= TAKE_ALLOWS
    if (
        submit.bad_words
        or submit.repetition_penalty != 1.0
        or submit.presence_penalty
        or submit.frequency_penalty
    ):
        flags |= TAKE_COUNTS
    if submit.grammar:
        flags |= TAKE_GRAMMAR
    return flags


def _edits(submit: Submit) -> Int32Array:
    """What the request changes in its logits: int32 [n, EDIT_WORDS], the slots left 0."""
    banned = submit.stop_token_ids if submit.min_tokens else ()
    if not (submit.logit_bias or submit.allowed_token_ids or submit.bad_words or banned):
        return _NO_EDITS
    rows = [
        (0, EDIT_BIAS, token, int(np.float32(bias).view(np.int32)))
        for token, bias in submit.logit_bias.items()
    ]
    rows += [(0, EDIT_ALLOW, token, 0) for token in submit.allowed_token_ids]
    rows += [(0, EDIT_BAN_UNTIL, token, 0) for token in banned]
    for word in submit.bad_words:
        rows += [(0, EDIT_BAD_WORD, token, len(word) - 1 - at) for at, token in enumerate(word)]
    return np.array(rows, dtype=np.int32)
