"""Layout of a plan and of a result: the two records of a group's hot path.

Both are int32 words in a ring frame, written and read in place, arrays through
numpy views.  Floats travel as their bit pattern, 64-bit numbers as two words, low
word first.

A plan (scheduler -> every rank of the group), for one step:

    header         16 words: magic, step lo, step hi, flags, then the counts n_take,
                   n_append, n_chunk, n_chunk_token, n_decode, n_edit, n_history,
                   n_history_token, n_grammar, n_grammar_word, n_score, n_copy
    take           n_take x 16    slots given to requests, with their sampling state
    append         n_append x 3   (slot, index in its block table, block)
    chunk          n_chunk x 4    prefill: (slot, start, length, 1 if it samples)
    chunk_token    n_chunk_token  token ids of the chunks, one after the other
    decode         n_decode       slots that go on by one token
    edit           n_edit x 4     (slot, kind, token, value): what a request changes in its logits
    history        n_history x 3  (slot, start, length): tokens of a slot that no chunk brings
    history_token  n_history_token  their ids, one after the other
    grammar        n_grammar x 2  (slot, bytes): what the output of a slot just taken has to match
    grammar_word   n_grammar_word  their texts, UTF-8, each filled up to whole words
    score          n_score x 2    (row of chunk_token, token that follows it): prompt logprobs
    copy           n_copy x 3     (kind, from, to): KV blocks to move before the step

The worker keeps everything else: a slot's position, its last token, its block
table.  Order of effect: copy, take, append, edit, history, chunk, decode.  A
chunk covers positions start .. start+length-1; `samples` is 1 on the last chunk
of a prompt only.  A decode feeds the slot's last token at its position.  The
sampling rows of a step are the sampling chunks in their order, then the decodes
in theirs.

Tokens of a slot at positions below TAKE_PROMPT_LEN are its prompt, the others
its output, however they come: by chunk, by history, or sampled.  A slot whose
TAKE_FLAGS have COUNTS or GRAMMAR gets every one of them exactly once.

A result (rank 0 -> scheduler and detokenizer), one for each plan:

    header        8 words: magic, step lo, step hi, n_row, step_us, forward_us, n_logprob, 0
    row           n_row x 3       (request, count, token), in sampling-row order
    logprob       n_logprob x 44  (request, position, logprob, rank, 20 ids, 20 logprobs):
                                  of the token at `position`, and of the best ones there

`count` is the number of tokens of the row: 1, or 0 where the request has to end
without one; `token` then says why (ROW_...).  Rows name the request, never
the slot alone: slots are reused while results are still on their way.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .grammars import MAX_GRAMMAR_BYTES

Int32Array = npt.NDArray[np.int32]

PLAN_MAGIC = 0x414C4250
RESULT_MAGIC = 0x414C4252
PLAN_HEADER = 16
RESULT_HEADER = 8
_RESULT_HEAD = struct.Struct(f"={RESULT_HEADER}i")
ROW_WORDS = 3

TAKE_WORDS = 16
TAKE_SLOT, TAKE_REQUEST, TAKE_SEED_LO, TAKE_SEED_HI = 0, 1, 2, 3
TAKE_TEMPERATURE, TAKE_TOP_K, TAKE_TOP_P, TAKE_MIN_P = 4, 5, 6, 7
TAKE_PROMPT_LEN, TAKE_START = 8, 9
TAKE_REPETITION, TAKE_PRESENCE, TAKE_FREQUENCY = 10, 11, 12
TAKE_FLAGS, TAKE_UNTIL, TAKE_LOGPROBS = 13, 14, 15
"""START: tokens that are in the cache already.  UNTIL: an EDIT_BAN_UNTIL holds for tokens at
positions below it.  LOGPROBS: 0: none; 1 + k: those of the sampled token and of the k best."""

TAKE_COUNTS = 1
"""Flag: penalties or bad words look at the slot's tokens."""
TAKE_EDITS = 2
"""Flag: the slot has edits."""
TAKE_ALLOWS = 4
"""Flag: some of them are EDIT_ALLOW."""
TAKE_GRAMMAR = 8
"""Flag: the slot has a grammar."""

ROW_NOT_FINITE, ROW_GRAMMAR_END, ROW_GRAMMAR_FAILED, ROW_NOTHING_ALLOWED = 0, 1, 2, 3
"""Why a row has no token: the logits are not finite; the grammar can only stop here; its matcher
has exceeded a limit; what the request allows, its grammar among it, leaves no token."""

EDIT_BIAS, EDIT_ALLOW, EDIT_BAN_UNTIL, EDIT_BAD_WORD = 0, 1, 2, 3
"""`value` of a bias: the float32 added to the token's logit.  Of a bad word's token: how many
tokens of the word follow; the last, whose value is 0, is banned where the others are the newest
output tokens.  The tokens of one word are in consecutive rows.  Of the others: 0."""

COPY_OUT, COPY_IN, COPY_BLOCK = 0, 1, 2
"""KV block -> host block, host block -> KV block, KV block -> KV block."""

APPEND_WORDS = 3
CHUNK_WORDS = 4
EDIT_WORDS = 4
HISTORY_WORDS = 3
GRAMMAR_WORDS = 2
SCORE_WORDS = 2
COPY_WORDS = 3

MAX_TOP_LOGPROBS = 20
LOGPROB_WORDS = 4 + 2 * MAX_TOP_LOGPROBS
MAX_BAD_WORD_TOKENS = 16

MAX_PLAN_EDITS = 8192
"""Edits of one plan; a request may have as many at most."""
MAX_PLAN_GRAMMAR_WORDS = MAX_GRAMMAR_BYTES // 4
"""Words of the grammars of one plan; a request may have as many at most."""
MAX_PLAN_SCORES = 128
"""Prompt positions that one step scores."""
MAX_PLAN_COPIES = 512
"""Blocks that one plan moves."""

FLAG_STOP = 1
"""The last plan: every rank leaves its loop after it."""


def max_appends(
    max_num_seqs: int, max_num_batched_tokens: int, block_size: int, max_model_len: int
) -> int:
    """Block-table entries of the largest plan.

    One for every decode; for every chunk those that it fills and a last, partial
    one; and those that an admission finds in the prefix cache.
    """
    return 2 * max_num_seqs + (max_num_batched_tokens + max_model_len) // block_size + 2


def plan_bytes(
    max_num_seqs: int, max_num_batched_tokens: int, block_size: int, max_model_len: int
) -> int:
    """Bytes of the largest plan that the scheduler's budgets allow."""
    appends = max_appends(max_num_seqs, max_num_batched_tokens, block_size, max_model_len)
    words = (
        PLAN_HEADER
        + max_num_seqs * (TAKE_WORDS + CHUNK_WORDS + 1 + HISTORY_WORDS + GRAMMAR_WORDS)
        + appends * APPEND_WORDS
        + max_num_batched_tokens
        + MAX_PLAN_EDITS * EDIT_WORDS
        + max_model_len
        + MAX_PLAN_GRAMMAR_WORDS
        + MAX_PLAN_SCORES * SCORE_WORDS
        + MAX_PLAN_COPIES * COPY_WORDS
    )
    return words * 4


def result_bytes(max_num_seqs: int) -> int:
    """Bytes of the largest result."""
    logprobs = max_num_seqs + MAX_PLAN_SCORES
    return (RESULT_HEADER + max_num_seqs * ROW_WORDS + logprobs * LOGPROB_WORDS) * 4


NOTHING = np.empty(0, dtype=np.int32)

SECTIONS = (
    ("take", TAKE_WORDS),
    ("append", APPEND_WORDS),
    ("chunk", CHUNK_WORDS),
    ("chunk_token", 1),
    ("decode", 1),
    ("edit", EDIT_WORDS),
    ("history", HISTORY_WORDS),
    ("history_token", 1),
    ("grammar", GRAMMAR_WORDS),
    ("grammar_word", 1),
    ("score", SCORE_WORDS),
    ("copy", COPY_WORDS),
)
"""Name and words a row of each section, in their order in the frame."""


class PlanSections(NamedTuple):
    """The sections of a plan: int32 [rows, words a row], or [rows] where that is 1."""

    take: Int32Array = NOTHING
    append: Int32Array = NOTHING
    chunk: Int32Array = NOTHING
    chunk_token: Int32Array = NOTHING
    decode: Int32Array = NOTHING
    edit: Int32Array = NOTHING
    history: Int32Array = NOTHING
    history_token: Int32Array = NOTHING
    grammar: Int32Array = NOTHING
    grammar_word: Int32Array = NOTHING
    score: Int32Array = NOTHING
    copy: Int32Array = NOTHING


class PlanView:
    """A plan laid over a ring frame; its arrays are views, valid until the frame is released.

    An attribute for each section, as in PlanSections; words: the whole plan.
    """

    __slots__ = ("flags", "step", "words", *(name for name, _ in SECTIONS))

    take: Int32Array
    append: Int32Array
    chunk: Int32Array
    chunk_token: Int32Array
    decode: Int32Array
    edit: Int32Array
    history: Int32Array
    history_token: Int32Array
    grammar: Int32Array
    grammar_word: Int32Array
    score: Int32Array
    copy: Int32Array

    def __init__(self, frame: memoryview) -> None:
        words = np.frombuffer(frame, dtype=np.int32)
        head = words[:PLAN_HEADER].tolist()
        if head[0] != PLAN_MAGIC:
            raise ValueError(f"not a plan: magic {head[0]:#x}")
        self.step: int = (head[1] & 0xFFFFFFFF) | (head[2] << 32)
        self.flags: int = head[3]
        at = PLAN_HEADER
        for (name, width), rows in zip(SECTIONS, head[4:], strict=False):
            section = words[at : at + rows * width]
            setattr(self, name, section.reshape(-1, width) if width > 1 else section)
            at += rows * width
        self.words: Int32Array = words[:at]


def write_plan(frame: memoryview, step: int, flags: int, sections: PlanSections) -> int:
    """Writes a plan into a frame and returns its length in bytes.

    Raises ValueError when it does not fit: the scheduler's budgets were wrong.
    """
    total = PLAN_HEADER + sum(section.size for section in sections)
    if total * 4 > len(frame):
        raise ValueError(f"a plan of {total * 4} bytes does not fit a frame of {len(frame)}")
    words = np.frombuffer(frame, dtype=np.int32)
    words[4 + len(SECTIONS) : PLAN_HEADER] = 0
    words[: 4 + len(SECTIONS)] = (
        PLAN_MAGIC, _low(step), step >> 32, flags, *map(len, sections),
    )  # fmt: skip
    at = PLAN_HEADER
    for section in sections:
        if section.size:
            words[at : at + section.size] = section.reshape(-1)
            at += section.size
    return total * 4


class ResultView:
    """A result laid over a ring frame; valid until release.

    rows: [n_row, 3] int32.  logprobs: [n_logprob, LOGPROB_WORDS] int32.
    """

    __slots__ = ("forward_us", "logprobs", "rows", "step", "step_us")

    def __init__(self, frame: memoryview) -> None:
        words = np.frombuffer(frame, dtype=np.int32)
        head = words[:RESULT_HEADER].tolist()
        if head[0] != RESULT_MAGIC:
            raise ValueError(f"not a result: magic {head[0]:#x}")
        self.step: int = (head[1] & 0xFFFFFFFF) | (head[2] << 32)
        self.step_us: int = head[4]
        self.forward_us: int = head[5]
        end = RESULT_HEADER + head[3] * ROW_WORDS
        self.rows: Int32Array = words[RESULT_HEADER:end].reshape(-1, ROW_WORDS)
        self.logprobs: Int32Array = words[end : end + head[6] * LOGPROB_WORDS].reshape(
            -1, LOGPROB_WORDS
        )


def write_result(
    frame: memoryview,
    step: int,
    rows: Int32Array,
    step_us: int,
    forward_us: int,
    logprobs: Int32Array = NOTHING,
) -> int:
    """Writes a result and returns its length in bytes; rows, logprobs: as in ResultView,
    C-contiguous, and int32, as which their bytes are read."""
    _RESULT_HEAD.pack_into(
        frame, 0,
        RESULT_MAGIC, _low(step), step >> 32, len(rows), step_us, forward_us, len(logprobs), 0,
    )  # fmt: skip
    end = _RESULT_HEAD.size
    for part in (rows, logprobs):
        if part.size:
            begin, end = end, end + part.nbytes
            frame[begin:end] = part.data.cast("B")
    return end


def split64(value: int) -> tuple[int, int]:
    """A 64-bit number (signed or unsigned) as two int32 words, low word first."""
    value &= 0xFFFFFFFFFFFFFFFF
    return _low(value), _low(value >> 32)


def _low(value: int) -> int:
    """The low 32 bits as a signed word."""
    return ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
