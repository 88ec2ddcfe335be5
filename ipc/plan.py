"""Layout of a plan and of a result: the two records of a group's hot path.

Both are int32 words in a ring frame, written and read in place through numpy
views.  Floats travel as their bit pattern, 64-bit numbers as two words, low
word first.

A plan (scheduler -> every rank of the group), for one step:

    header        16 words: magic, step lo, step hi, flags, n_take, n_append,
                  n_chunk, n_chunk_token, n_decode, 0 ...
    take          n_take x 10    slots given to requests, with their sampling state
    append        n_append x 3   (slot, index in its block table, block)
    chunk         n_chunk x 4    prefill: (slot, start, length, 1 if it samples)
    chunk_token   n_chunk_token  token ids of the chunks, one after the other
    decode        n_decode       slots that go on by one token

The worker keeps everything else: a slot's position, its last token, its block
table.  Order of effect: take, append, chunk, decode.  A chunk covers positions
start .. start+length-1; `samples` is 1 on the last chunk of a prompt only.  A
decode feeds the slot's last token at its position.  The sampling rows of a
step are the sampling chunks in their order, then the decodes in theirs.

A result (rank 0 -> scheduler and detokenizer), one for each plan:

    header        8 words: magic, step lo, step hi, n_row, step_us, forward_us, 0, 0
    row           n_row x 3      (request, count, token), in sampling-row order

`count` is the number of tokens of the row: 1, or 0 where the logits were not
finite and the request has to end with an error.  Rows name the request, never
the slot alone: slots are reused while results are still on their way.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]

PLAN_MAGIC = 0x414C4250
RESULT_MAGIC = 0x414C4252
PLAN_HEADER = 16
RESULT_HEADER = 8
ROW_WORDS = 3

TAKE_WORDS = 10
TAKE_SLOT, TAKE_REQUEST, TAKE_SEED_LO, TAKE_SEED_HI = 0, 1, 2, 3
TAKE_TEMPERATURE, TAKE_TOP_K, TAKE_TOP_P, TAKE_MIN_P = 4, 5, 6, 7
TAKE_PROMPT_LEN, TAKE_START = 8, 9

APPEND_WORDS = 3
CHUNK_WORDS = 4

FLAG_STOP = 1
"""The last plan: every rank leaves its loop after it."""


def plan_bytes(max_num_seqs: int, max_num_batched_tokens: int, block_size: int) -> int:
    """Bytes of the largest plan that the scheduler's budgets allow."""
    appends = max_num_seqs * 2 + max_num_batched_tokens // block_size + 1
    words = (
        PLAN_HEADER
        + max_num_seqs * (TAKE_WORDS + CHUNK_WORDS + 1)
        + appends * APPEND_WORDS
        + max_num_batched_tokens
    )
    return words * 4


def result_bytes(max_num_seqs: int) -> int:
    """Bytes of the largest result."""
    return (RESULT_HEADER + max_num_seqs * ROW_WORDS) * 4


class PlanView:
    """A plan laid over a ring frame; its arrays are views, valid until the frame is released.

    take: [n_take, 10], append: [n_append, 3], chunk: [n_chunk, 4],
    chunk_token: [n_chunk_token], decode: [n_decode]; words: the whole plan; all int32.
    """

    __slots__ = ("append", "chunk", "chunk_token", "decode", "flags", "step", "take", "words")

    def __init__(self, frame: memoryview) -> None:
        words = np.frombuffer(frame, dtype=np.int32)
        head = words[:PLAN_HEADER].tolist()
        if head[0] != PLAN_MAGIC:
            raise ValueError(f"not a plan: magic {head[0]:#x}")
        self.step: int = (head[1] & 0xFFFFFFFF) | (head[2] << 32)
        self.flags: int = head[3]
        n_take, n_append, n_chunk, n_token, n_decode = head[4:9]
        at = PLAN_HEADER
        self.take: Int32Array = words[at : at + n_take * TAKE_WORDS].reshape(-1, TAKE_WORDS)
        at += n_take * TAKE_WORDS
        self.append: Int32Array = words[at : at + n_append * APPEND_WORDS].reshape(-1, APPEND_WORDS)
        at += n_append * APPEND_WORDS
        self.chunk: Int32Array = words[at : at + n_chunk * CHUNK_WORDS].reshape(-1, CHUNK_WORDS)
        at += n_chunk * CHUNK_WORDS
        self.chunk_token: Int32Array = words[at : at + n_token]
        at += n_token
        self.decode: Int32Array = words[at : at + n_decode]
        self.words: Int32Array = words[: at + n_decode]


def write_plan(
    frame: memoryview,
    step: int,
    flags: int,
    take: Int32Array,
    append: Int32Array,
    chunk: Int32Array,
    chunk_token: Int32Array,
    decode: Int32Array,
) -> int:
    """Writes a plan into a frame and returns its length in bytes.

    The shapes are those of PlanView.  Raises ValueError when it does not fit:
    the scheduler's budgets were wrong.
    """
    sections = (take, append, chunk, chunk_token, decode)
    total = PLAN_HEADER + sum(section.size for section in sections)
    if total * 4 > len(frame):
        raise ValueError(f"a plan of {total * 4} bytes does not fit a frame of {len(frame)}")
    words = np.frombuffer(frame, dtype=np.int32)
    words[:PLAN_HEADER] = 0
    words[:9] = (
        PLAN_MAGIC,
        _low(step),
        step >> 32,
        flags,
        len(take),
        len(append),
        len(chunk),
        len(chunk_token),
        len(decode),
    )
    at = PLAN_HEADER
    for section in sections:
        words[at : at + section.size] = section.reshape(-1)
        at += section.size
    return total * 4


class ResultView:
    """A result laid over a ring frame.  rows: [n_row, 3] int32, valid until release."""

    __slots__ = ("forward_us", "rows", "step", "step_us")

    def __init__(self, frame: memoryview) -> None:
        words = np.frombuffer(frame, dtype=np.int32)
        head = words[:RESULT_HEADER].tolist()
        if head[0] != RESULT_MAGIC:
            raise ValueError(f"not a result: magic {head[0]:#x}")
        self.step: int = (head[1] & 0xFFFFFFFF) | (head[2] << 32)
        self.step_us: int = head[4]
        self.forward_us: int = head[5]
        self.rows: Int32Array = words[RESULT_HEADER : RESULT_HEADER + head[3] * ROW_WORDS].reshape(
            -1, ROW_WORDS
        )


def write_result(
    frame: memoryview, step: int, rows: Int32Array, step_us: int, forward_us: int
) -> int:
    """Writes a result ([n_row, 3] int32 rows) and returns its length in bytes."""
    words = np.frombuffer(frame, dtype=np.int32)
    words[:RESULT_HEADER] = (
        RESULT_MAGIC, _low(step), step >> 32, len(rows), step_us, forward_us, 0, 0,
    )  # fmt: skip
    words[RESULT_HEADER : RESULT_HEADER + rows.size] = rows.reshape(-1)
    return (RESULT_HEADER + rows.size) * 4


def split64(value: int) -> tuple[int, int]:
    """A 64-bit number (signed or unsigned) as two int32 words, low word first."""
    value &= 0xFFFFFFFFFFFFFFFF
    return _low(value), _low(value >> 32)


def _low(value: int) -> int:
    """The low 32 bits as a signed word."""
    return ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
