"""A plan while it is made: buffers of full size, filled from the front.

The buffers are made once; a Plan's arrays are views of them, valid until the
next plan is begun.  That is long enough: a plan is written into the ring at
once (ipc/plan.py has the layout and the meaning of the sections).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from albireo.ipc.plan import APPEND_WORDS, CHUNK_WORDS, TAKE_WORDS, Int32Array

from .blocks import Slots


class Plan(NamedTuple):
    """One step, in the shapes of ipc.plan.PlanView; the arrays die with the next plan.

    sampled: int32 [n_row], the request of each sampling row; not sent, the
        workers know it.
    """

    step: int
    take: Int32Array
    append: Int32Array
    chunk: Int32Array
    chunk_token: Int32Array
    decode: Int32Array
    sampled: Int32Array


class Draft:
    """The sections of the plan that is being made."""

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int, block_size: int) -> None:
        # A block for every decode, and for every chunk those it fills and a last, partial one.
        appends = 2 * max_num_seqs + max_num_batched_tokens // block_size + 1
        self._take = np.zeros((max_num_seqs, TAKE_WORDS), dtype=np.int32)
        self._append = np.zeros((appends, APPEND_WORDS), dtype=np.int32)
        self._chunk = np.zeros((max_num_seqs, CHUNK_WORDS), dtype=np.int32)
        self._chunk_token = np.zeros(max_num_batched_tokens, dtype=np.int32)
        self.clear()

    def clear(self) -> None:
        """Begins a plan."""
        self._takes = self._appends = self._chunks = self._chunk_tokens = 0

    @property
    def chunks(self) -> int:
        """Chunks so far."""
        return self._chunks

    def add_take(self, words: Int32Array) -> None:
        """A slot is given to a request: its [TAKE_WORDS] int32 words."""
        self._take[self._takes] = words
        self._takes += 1

    def add_append(self, slots: Slots | int, index: Int32Array | Slots, blocks: Int32Array) -> None:
        """Entries of block tables, one for each block: [n] each, or the same slot for all."""
        rows = self._append[self._appends : self._appends + len(blocks)]
        rows[:, 0] = slots
        rows[:, 1] = index
        rows[:, 2] = blocks
        self._appends += len(blocks)

    def add_chunk(self, slot: int, start: int, tokens: Int32Array, samples: bool) -> None:
        """A piece of a prefill: its tokens begin at position `start`."""
        self._chunk[self._chunks] = (slot, start, len(tokens), samples)
        self._chunks += 1
        self._chunk_token[self._chunk_tokens : self._chunk_tokens + len(tokens)] = tokens
        self._chunk_tokens += len(tokens)

    def sampling_chunks(self) -> Slots:
        """Slots of the chunks that sample, in their order."""
        chunks = self._chunk[: self._chunks]
        sampling: Slots = chunks[chunks[:, 3] == 1, 0].astype(np.intp)
        return sampling

    def plan(self, step: int, decode: Slots, sampled: Int32Array) -> Plan:
        """The finished plan."""
        return Plan(
            step,
            self._take[: self._takes],
            self._append[: self._appends],
            self._chunk[: self._chunks],
            self._chunk_token[: self._chunk_tokens],
            decode.astype(np.int32),
            sampled,
        )
