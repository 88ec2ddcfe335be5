"""The kernels that make a step's input of the slot tables and the plan on the device.

    decodes   of a step of decodes alone, padded by rows of the dummy slot
    mixed     of any step: the chunks' rows and sequences, then the decodes', then what is scored

A mixed step may be padded too (StepBatch says how).  Counts and places are read
from the plan, sizes are the launch's own: a captured launch serves every plan
that fits them.  Rows that pad compute token 0 and write to the scratch block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .mixed_sizes import MixedSize
from .plan_words import (
    APPEND,
    AT_N_APPEND,
    AT_N_CHUNK,
    AT_N_DECODE,
    AT_N_EDIT,
    AT_N_GRAMMAR,
    AT_N_GRAMMAR_WORD,
    AT_N_HISTORY,
    AT_N_HISTORY_TOKEN,
    AT_N_SCORE,
    AT_N_TAKE,
    AT_N_TOKEN,
    CHUNK,
    EDIT,
    GRAMMAR,
    HEADER,
    HISTORY,
    SCORE,
    TAKE,
)
from .slot_tables import SlotTables

_BLOCK = 128
_CHUNK_PARTS = 8


@triton.jit(do_not_specialize=["count"])
def _gather_decodes(
    decode, position, last_token, block_tables,
    tokens, positions, kv_index, query_start, context_len, slots,
    sample_rows, sample_slots, draw_position, count, table_width,
    BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row, sequence and sampling row i for each of `count` slots in `decode`."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    slot = tl.load(decode + i, mask=there, other=0)
    at = tl.load(position + slot, mask=there, other=0)
    token = tl.load(last_token + slot, mask=there, other=0)
    block = tl.load(block_tables + slot * table_width + at // BLOCK_SIZE, mask=there, other=0)
    tl.store(tokens + i, token, mask=there)
    tl.store(positions + i, at, mask=there)
    tl.store(kv_index + i, block * BLOCK_SIZE + at % BLOCK_SIZE, mask=there)
    tl.store(slots + i, slot, mask=there)
    tl.store(query_start + i, i, mask=i <= count)
    tl.store(context_len + i, at + 1, mask=there)
    tl.store(sample_rows + i, i, mask=there)
    tl.store(sample_slots + i, slot, mask=there)
    tl.store(draw_position + i, at + 1, mask=there)


@triton.jit
def _gather_chunks(
    words, block_tables,
    tokens, positions, kv_index, query_start, context_len, slots,
    sample_rows, sample_slots, draw_position, table_width, dummy_slot,
    BLOCK_SIZE: tl.constexpr, CHUNKS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (c, p) writes every PARTS-th piece of chunk c's rows; CHUNKS: a bound of all.

    A chunk that the plan does not have gets no rows, behind those of all others.
    """
    chunk = tl.program_id(0)
    part = tl.program_id(1)
    n_take = tl.load(words + AT_N_TAKE)
    n_append = tl.load(words + AT_N_APPEND)
    n_chunk = tl.load(words + AT_N_CHUNK)
    chunks = words + HEADER + n_take * TAKE + n_append * APPEND
    chunk_tokens = chunks + n_chunk * CHUNK

    others = tl.arange(0, CHUNKS)
    before = (others < chunk) & (others < n_chunk)
    lengths = tl.load(chunks + others * CHUNK + 2, mask=before, other=0)
    samples = tl.load(chunks + others * CHUNK + 3, mask=before, other=0)
    first_row = tl.sum(lengths, 0)
    sample = tl.sum((samples != 0).to(tl.int32), 0)

    there = chunk < n_chunk
    slot = tl.load(chunks + chunk * CHUNK, mask=there, other=0)
    start = tl.load(chunks + chunk * CHUNK + 1, mask=there, other=0)
    length = tl.load(chunks + chunk * CHUNK + 2, mask=there, other=0)
    does_sample = tl.load(chunks + chunk * CHUNK + 3, mask=there, other=0) != 0
    if part == 0:
        tl.store(slots + chunk, tl.where(there, slot, dummy_slot))
        tl.store(query_start + chunk, first_row)
        tl.store(query_start + chunk + 1, first_row + length)
        tl.store(context_len + chunk, start + length)
        if does_sample:
            tl.store(sample_rows + sample, first_row + length - 1)
            tl.store(sample_slots + sample, slot)
            tl.store(draw_position + sample, start + length)
    for first in range(part * BLOCK, length, PARTS * BLOCK):
        i = first + tl.arange(0, BLOCK)
        here = i < length
        row = first_row + i
        at = start + i
        token = tl.load(chunk_tokens + row, mask=here, other=0)
        block = tl.load(block_tables + slot * table_width + at // BLOCK_SIZE, mask=here, other=0)
        tl.store(tokens + row, token, mask=here)
        tl.store(positions + row, at, mask=here)
        tl.store(kv_index + row, block * BLOCK_SIZE + at % BLOCK_SIZE, mask=here)


@triton.jit(do_not_specialize=["rows", "chunks", "decodes", "logits"])
def _gather_rest(
    words, decode, position, last_token, block_tables,
    tokens, positions, kv_index, query_start, context_len, slots,
    sample_rows, score_tokens, sample_slots, draw_position,
    rows, chunks, decodes, logits, table_width, dummy_slot,
    BLOCK_SIZE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What comes behind the chunks: decodes, scored rows, padding.  The sizes: see MixedSize."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n_take = tl.load(words + AT_N_TAKE)
    n_append = tl.load(words + AT_N_APPEND)
    n_chunk = tl.load(words + AT_N_CHUNK)
    n_token = tl.load(words + AT_N_TOKEN)
    n_decode = tl.load(words + AT_N_DECODE)
    n_score = tl.load(words + AT_N_SCORE)
    chunk_section = words + HEADER + n_take * TAKE + n_append * APPEND
    c = tl.arange(0, CHUNKS)
    samples = tl.load(chunk_section + c * CHUNK + 3, mask=c < n_chunk, other=0)
    sampling_chunks = tl.sum((samples != 0).to(tl.int32), 0)

    there = i < n_decode
    slot = tl.load(decode + i, mask=there, other=0)
    at = tl.load(position + slot, mask=there, other=0)
    token = tl.load(last_token + slot, mask=there, other=0)
    block = tl.load(block_tables + slot * table_width + at // BLOCK_SIZE, mask=there, other=0)
    row = n_token + i
    sample = sampling_chunks + i
    tl.store(tokens + row, token, mask=there)
    tl.store(positions + row, at, mask=there)
    tl.store(kv_index + row, block * BLOCK_SIZE + at % BLOCK_SIZE, mask=there)
    tl.store(sample_rows + sample, row, mask=there)
    tl.store(sample_slots + sample, slot, mask=there)
    tl.store(draw_position + sample, at + 1, mask=there)
    sequence = chunks + i
    tl.store(slots + sequence, tl.where(there, slot, dummy_slot), mask=i < decodes)
    tl.store(context_len + sequence, tl.where(there, at + 1, 0), mask=i < decodes)
    tl.store(query_start + sequence, n_token + tl.minimum(i, n_decode), mask=i <= decodes)

    # Rows of chunks whose logits are wanted too, and the tokens that follow them.
    score = (
        chunk_section + n_chunk * CHUNK + n_token + n_decode
        + tl.load(words + AT_N_EDIT) * EDIT
        + tl.load(words + AT_N_HISTORY) * HISTORY + tl.load(words + AT_N_HISTORY_TOKEN)
        + tl.load(words + AT_N_GRAMMAR) * GRAMMAR + tl.load(words + AT_N_GRAMMAR_WORD)
        + i * SCORE
    )  # fmt: skip
    scored = i < n_score
    first = sampling_chunks + n_decode
    tl.store(sample_rows + first + i, tl.load(score, mask=scored, other=0), mask=scored)
    tl.store(score_tokens + i, tl.load(score + 1, mask=scored, other=0), mask=scored)

    unread = first + n_score + i
    tl.store(sample_rows + unread, tl.zeros([BLOCK], tl.int32), mask=unread < logits)
    spare = n_token + n_decode + i
    scratch = tl.load(block_tables + dummy_slot * table_width)
    tl.store(tokens + spare, tl.zeros([BLOCK], tl.int32), mask=spare < rows)
    tl.store(positions + spare, tl.zeros([BLOCK], tl.int32), mask=spare < rows)
    tl.store(kv_index + spare, scratch * BLOCK_SIZE + i % BLOCK_SIZE, mask=spare < rows)


def gather_decodes(tables: SlotTables, count: int) -> None:
    """The input of a step of the first `count` slots of tables.decode and nothing else."""
    _gather_decodes[(triton.cdiv(count + 1, _BLOCK),)](
        tables.decode, tables.position, tables.last_token, tables.block_tables,
        tables.tokens, tables.positions, tables.kv_index, tables.query_start,
        tables.context_len, tables.slots, tables.sample_rows, tables.sample_slots,
        tables.draw_position, count, tables.block_tables.shape[1],
        BLOCK_SIZE=tables.block_size, BLOCK=_BLOCK,
    )  # fmt: skip


def gather_mixed(tables: SlotTables, size: MixedSize) -> None:
    """The input of the step of the plan in tables.words, which fits `size`, or is of it."""
    chunks = triton.next_power_of_2(tables.max_num_seqs)
    if size.chunks:
        _gather_chunks[(size.chunks, _CHUNK_PARTS)](
            tables.words, tables.block_tables,
            tables.tokens, tables.positions, tables.kv_index, tables.query_start,
            tables.context_len, tables.slots, tables.sample_rows, tables.sample_slots,
            tables.draw_position, tables.block_tables.shape[1], tables.dummy_slot,
            BLOCK_SIZE=tables.block_size, CHUNKS=chunks, PARTS=_CHUNK_PARTS, BLOCK=_BLOCK,
        )  # fmt: skip
    _gather_rest[(triton.cdiv(max(size.rows, size.decodes + 1), _BLOCK),)](
        tables.words, tables.decode, tables.position, tables.last_token, tables.block_tables,
        tables.tokens, tables.positions, tables.kv_index, tables.query_start,
        tables.context_len, tables.slots, tables.sample_rows, tables.score_tokens,
        tables.sample_slots, tables.draw_position,
        size.rows, size.chunks, size.decodes, size.logits, tables.block_tables.shape[1],
        tables.dummy_slot, BLOCK_SIZE=tables.block_size, CHUNKS=chunks, BLOCK=_BLOCK,
    )  # fmt: skip
