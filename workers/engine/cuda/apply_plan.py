"""The kernels around a forward pass: a plan into the slot tables, and a step's end into them.

In stream order, every step:

    apply     take and append sections into the tables; the decode set, padded, into `decode`
    gather    a row, or several, for each sequence: see gather.py
    (forward pass, sampling)
    advance   positions move past the step; sampled tokens become the slots' last tokens,
              and are counted where penalties or bad words look at them

The plan is read on the device, its counts included, so `apply` and the gathers
take no number that changes from step to step and can be captured.  The sizes
of a step are plain integers, never specialised on.  All kernels run under
Triton's interpreter too (TRITON_INTERPRET=1), which is how they are tested
without a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ipc.plan import (
    TAKE_COUNTS,
    TAKE_FLAGS,
    TAKE_FREQUENCY,
    TAKE_LOGPROBS,
    TAKE_MIN_P,
    TAKE_PRESENCE,
    TAKE_PROMPT_LEN,
    TAKE_REPETITION,
    TAKE_REQUEST,
    TAKE_SEED_HI,
    TAKE_SEED_LO,
    TAKE_SLOT,
    TAKE_START,
    TAKE_TEMPERATURE,
    TAKE_TOP_K,
    TAKE_TOP_P,
    TAKE_UNTIL,
)
from ...sampling.cuda.edit_tables import NEWEST
from .plan_words import (
    APPEND,
    AT_N_APPEND,
    AT_N_CHUNK,
    AT_N_DECODE,
    AT_N_TAKE,
    AT_N_TOKEN,
    CHUNK,
    HEADER,
    TAKE,
)
from .slot_tables import SlotTables

_PROGRAMS = 16
_BLOCK = 128

_SLOT = tl.constexpr(TAKE_SLOT)
_SEED_LO = tl.constexpr(TAKE_SEED_LO)
_SEED_HI = tl.constexpr(TAKE_SEED_HI)
_TEMPERATURE = tl.constexpr(TAKE_TEMPERATURE)
_TOP_K = tl.constexpr(TAKE_TOP_K)
_TOP_P = tl.constexpr(TAKE_TOP_P)
_MIN_P = tl.constexpr(TAKE_MIN_P)
_START = tl.constexpr(TAKE_START)
_PROMPT_LEN = tl.constexpr(TAKE_PROMPT_LEN)
_REPETITION = tl.constexpr(TAKE_REPETITION)
_PRESENCE = tl.constexpr(TAKE_PRESENCE)
_FREQUENCY = tl.constexpr(TAKE_FREQUENCY)
_FLAGS = tl.constexpr(TAKE_FLAGS)
_UNTIL = tl.constexpr(TAKE_UNTIL)
_LOGPROBS = tl.constexpr(TAKE_LOGPROBS)
_COUNTS = tl.constexpr(TAKE_COUNTS)
_NEWEST = tl.constexpr(NEWEST)
assert TAKE_REQUEST == 1, "the request stays on the CPU; the kernel skips its word"


@triton.jit
def _take_int(take, slot, there, table, WORD: tl.constexpr):
    tl.store(table + slot, tl.load(take + WORD, mask=there, other=0), mask=there)


@triton.jit
def _take_float(take, slot, there, table, WORD: tl.constexpr):
    value = tl.load(take + WORD, mask=there, other=0).to(tl.float32, bitcast=True)
    tl.store(table + slot, value, mask=there)


@triton.jit
def _apply(
    words, position, temperature, top_k, top_p, min_p, seed_words, logprobs,
    repetition, presence, frequency, flags, until, prompt_len, block_tables, decode,
    table_width, dummy_slot, capacity,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program takes every PROGRAMS-th piece of each section; the sections write apart."""
    program = tl.program_id(0)
    n_take = tl.load(words + AT_N_TAKE)
    n_append = tl.load(words + AT_N_APPEND)
    n_chunk = tl.load(words + AT_N_CHUNK)
    n_token = tl.load(words + AT_N_TOKEN)
    n_decode = tl.load(words + AT_N_DECODE)
    lanes = tl.arange(0, BLOCK)

    takes = words + HEADER
    for first in range(program * BLOCK, n_take, PROGRAMS * BLOCK):
        i = first + lanes
        there = i < n_take
        take = takes + i * TAKE
        slot = tl.load(take + _SLOT, mask=there, other=0)
        low = tl.load(take + _SEED_LO, mask=there, other=0)
        high = tl.load(take + _SEED_HI, mask=there, other=0)
        tl.store(seed_words + slot * 2, low, mask=there)
        tl.store(seed_words + slot * 2 + 1, high, mask=there)
        _take_int(take, slot, there, position, _START)
        _take_int(take, slot, there, top_k, _TOP_K)
        _take_int(take, slot, there, logprobs, _LOGPROBS)
        _take_int(take, slot, there, flags, _FLAGS)
        _take_int(take, slot, there, until, _UNTIL)
        _take_int(take, slot, there, prompt_len, _PROMPT_LEN)
        _take_float(take, slot, there, temperature, _TEMPERATURE)
        _take_float(take, slot, there, top_p, _TOP_P)
        _take_float(take, slot, there, min_p, _MIN_P)
        _take_float(take, slot, there, repetition, _REPETITION)
        _take_float(take, slot, there, presence, _PRESENCE)
        _take_float(take, slot, there, frequency, _FREQUENCY)

    appends = takes + n_take * TAKE
    for first in range(program * BLOCK, n_append, PROGRAMS * BLOCK):
        i = first + lanes
        there = i < n_append
        slot = tl.load(appends + i * APPEND, mask=there, other=0)
        index = tl.load(appends + i * APPEND + 1, mask=there, other=0)
        block = tl.load(appends + i * APPEND + 2, mask=there, other=0)
        tl.store(block_tables + slot * table_width + index, block, mask=there)

    decodes = appends + n_append * APPEND + n_chunk * CHUNK + n_token
    for first in range(program * BLOCK, capacity, PROGRAMS * BLOCK):
        i = first + lanes
        slot = tl.load(decodes + i, mask=i < n_decode, other=0)
        tl.store(decode + i, tl.where(i < n_decode, slot, dummy_slot), mask=i < capacity)


@triton.jit(do_not_specialize=["sequences", "sampled_rows"])
def _advance(
    position, last_token, slots, context_len, sample_slots, draw_position, sampled,
    flags, counts, seen, num_seen, newest, first_id, width, room,
    sequences, sampled_rows, dummy_slot, BLOCK: tl.constexpr,
):  # fmt: skip
    """Padding rows share the dummy slot, which stays at position 0 and has no flags."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    fed = i < sequences
    slot = tl.load(slots + i, mask=fed, other=0)
    length = tl.load(context_len + i, mask=fed, other=0)
    tl.store(position + slot, length, mask=fed & (slot != dummy_slot))
    drawn = i < sampled_rows
    slot = tl.load(sample_slots + i, mask=drawn, other=0)
    token = tl.load(sampled + i, mask=drawn, other=0)
    tl.store(last_token + slot, tl.maximum(token, 0), mask=drawn & (slot != dummy_slot))
    # A slot has one row at most: nothing here needs to be atomic.
    flag = tl.load(flags + slot, mask=drawn, other=0)
    counted = drawn & ((flag & _COUNTS) != 0) & (token >= 0)
    at = tl.load(draw_position + i, mask=counted, other=0)
    tl.store(newest + slot * _NEWEST + at % _NEWEST, token, mask=counted)
    local = token - first_id
    here = counted & (local >= 0) & (local < width)
    local = tl.where(here, local, 0)
    count = counts + slot.to(tl.int64) * width + local
    before = tl.load(count, mask=here, other=0)
    tl.store(count, before + 1, mask=here)
    is_new = here & (before == 0)
    place = tl.load(num_seen + slot, mask=is_new, other=0)
    tl.store(seen + slot.to(tl.int64) * room + place, local, mask=is_new & (place < room))
    tl.store(num_seen + slot, place + 1, mask=is_new)


def apply(tables: SlotTables) -> None:
    """The effect of the plan in tables.words on the slots, and its decode set into tables.decode.

    Positions of slots that are fed move only in `advance`.
    """
    edits = tables.edits
    _apply[(_PROGRAMS,)](
        tables.words, tables.position, tables.temperature, tables.top_k, tables.top_p,
        tables.min_p, tables.seed_words, tables.logprobs, edits.repetition, edits.presence,
        edits.frequency, edits.flags, edits.until, edits.prompt_len, tables.block_tables,
        tables.decode, tables.block_tables.shape[1], tables.dummy_slot, tables.max_num_seqs,
        PROGRAMS=_PROGRAMS, BLOCK=_BLOCK,
    )  # fmt: skip


def advance(tables: SlotTables, sequences: int, sampled: int) -> None:
    """After sampling: tables.sampled [sampled] holds the tokens, negative where there is none."""
    edits = tables.edits
    _advance[(triton.cdiv(max(sequences, sampled), _BLOCK),)](
        tables.position, tables.last_token, tables.slots, tables.context_len,
        tables.sample_slots, tables.draw_position, tables.sampled,
        edits.flags, edits.counts, edits.seen, edits.num_seen, edits.newest, edits.first_id,
        edits.width, edits.room, sequences, sampled, tables.dummy_slot, BLOCK=_BLOCK,
    )  # fmt: skip
