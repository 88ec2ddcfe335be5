"""The slot tables of a worker, and the step's input that a plan makes of them.

The engine calls apply(plan) before the forward pass and commit(tokens) after
sampling.  Everything is written into buffers made once; the tensors of the
StepBatch share their memory.  Only prefill chunks are handled one by one: in
steady decode a step is a dozen numpy calls, whatever the number of sequences.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ...ipc.plan import MAX_PLAN_SCORES, PlanView
from ..sampling.params import SampleRows, ScoreRows, SlotParams
from .batch import StepBatch
from .slot_state import SlotState

Int32Array = npt.NDArray[np.int32]


class _Buffer:
    """int32 memory as a numpy array and as a tensor."""

    def __init__(self, *shape: int) -> None:
        self.array = np.zeros(shape, np.int32)
        self.tensor = torch.from_numpy(self.array)


class SlotTable:
    """Block tables, positions and last tokens of `slots` slots.

    max_blocks: most blocks of a sequence.  max_num_batched_tokens: most rows
    that a plan's chunks have together; its decodes have one row each.
    """

    def __init__(
        self, slots: int, max_blocks: int, max_num_batched_tokens: int, block_size: int
    ) -> None:
        max_rows = max_num_batched_tokens + slots
        self.state = SlotState(slots)
        self._block_size = block_size
        self._block_tables = _Buffer(slots, max_blocks)
        self._tokens = _Buffer(max_rows)
        self._positions = _Buffer(max_rows)
        self._kv_index = _Buffer(max_rows)
        self._query_start = _Buffer(slots + 1)
        self._context_len = _Buffer(slots)
        self._slots = _Buffer(slots)
        self._sample_rows = _Buffer(slots + MAX_PLAN_SCORES)
        # Scratch: the entry of the block table, and the place in the block, of each row.
        self._entry = np.zeros(max_rows, np.int32)
        self._offset = np.zeros(max_rows, np.int32)
        self._ramp = np.arange(max(max_rows, max_blocks * block_size) + 1, dtype=np.int32)

    @property
    def rows(self) -> SampleRows:
        """The sampling rows of the last plan."""
        return self.state.rows

    def scores(self, plan: PlanView) -> ScoreRows:
        """See SlotState.scores: the last len(plan.score) of the batch's sample_rows."""
        return self.state.scores(plan)

    @property
    def params(self) -> SlotParams:
        """The sampling parameters by slot."""
        return self.state.params

    def apply(self, plan: PlanView) -> StepBatch:
        """The plan's effect on the slots, and the input of its step, valid until the next call.

        Raises ValueError for a plan that contradicts the slots' state or
        exceeds the tables' sizes.
        """
        chunk_rows, chunks = len(plan.chunk_token), len(plan.chunk)
        rows, sequences = chunk_rows + len(plan.decode), chunks + len(plan.decode)
        if rows > len(self._tokens.array) or sequences > len(self._slots.array):
            raise ValueError(
                f"a plan of {rows} rows in {sequences} sequences exceeds the tables of "
                f"{len(self._tokens.array)} rows and {len(self._slots.array)} slots"
            )
        self.state.take(plan.take)
        if len(plan.append):
            slot, index, block = plan.append.T
            self._block_tables.array[slot, index] = block
        if chunks:
            self._lay_out_chunks(plan)
        self._lay_out_decodes(plan.decode, chunk_rows, chunks)
        self._place_in_cache(rows)
        self.state.advance(plan)
        scored = self._lay_out_scores(plan) if len(plan.score) else 0
        return self._batch(rows, sequences, chunks, scored)

    def commit(self, tokens: Int32Array) -> Int32Array:
        """See SlotState.commit."""
        return self.state.commit(tokens)

    def _lay_out_chunks(self, plan: PlanView) -> None:
        """Rows, sequences and sampling rows of the chunks, which come first."""
        self._tokens.array[: len(plan.chunk_token)] = plan.chunk_token
        row = sampling = 0
        for sequence, (slot, start, length, samples) in enumerate(plan.chunk.tolist()):
            end = row + length
            self._positions.array[row:end] = self._ramp[start : start + length]
            self._entry[row:end] = slot
            self._slots.array[sequence] = slot
            self._query_start.array[sequence] = row
            self._context_len.array[sequence] = start + length
            if samples:
                self._sample_rows.array[sampling] = end - 1
                sampling += 1
            row = end
        if row != len(plan.chunk_token):
            raise ValueError(
                f"the plan's chunks cover {row} tokens, but it carries {len(plan.chunk_token)}"
            )

    def _lay_out_decodes(self, decode: Int32Array, row: int, sequence: int) -> None:
        """Rows and sequences of the decodes, from row and sequence number on."""
        end, last = row + len(decode), sequence + len(decode)
        positions = self._positions.array[row:end]
        context_len = self._context_len.array[sequence:last]
        self._slots.array[sequence:last] = decode
        self._entry[row:end] = decode
        np.take(self.state.last_token, decode, out=self._tokens.array[row:end])
        np.take(self.state.position, decode, out=positions)
        np.add(positions, 1, out=context_len)
        self._query_start.array[sequence : last + 1] = self._ramp[row : end + 1]

    def _place_in_cache(self, rows: int) -> None:
        """kv_index of all rows from their slots (in _entry) and positions."""
        positions = self._positions.array[:rows]
        entry, offset = self._entry[:rows], self._offset[:rows]
        kv_index = self._kv_index.array[:rows]
        np.divmod(positions, self._block_size, out=(kv_index, offset))
        entry *= self._block_tables.array.shape[1]
        entry += kv_index
        np.take(self._block_tables.array.reshape(-1), entry, out=kv_index)
        kv_index *= self._block_size
        kv_index += offset

    def _lay_out_scores(self, plan: PlanView) -> int:
        """The rows that are scored, after those that are sampled: how many."""
        rows, sampled = plan.score[:, 0], len(self.state.rows)
        scored = len(rows)
        if scored > MAX_PLAN_SCORES or rows.min() < 0 or rows.max() >= len(plan.chunk_token):
            raise ValueError(
                f"a plan with {len(plan.chunk_token)} rows of chunks scores rows {rows.min()} to "
                f"{rows.max()}, {scored} of at most {MAX_PLAN_SCORES}"
            )
        self._sample_rows.array[sampled : sampled + scored] = rows
        return scored

    def _batch(self, rows: int, sequences: int, chunks: int, scored: int) -> StepBatch:
        sampled = len(self.state.rows)
        decodes = sequences - chunks
        self._sample_rows.array[sampled - decodes : sampled] = self._ramp[rows - decodes : rows]
        return StepBatch(
            tokens=self._tokens.tensor[:rows],
            positions=self._positions.tensor[:rows],
            kv_index=self._kv_index.tensor[:rows],
            query_start=self._query_start.tensor[: sequences + 1],
            context_len=self._context_len.tensor[:sequences],
            slots=self._slots.tensor[:sequences],
            block_tables=self._block_tables.tensor,
            sample_rows=self._sample_rows.tensor[: sampled + scored],
            num_chunks=chunks,
        )
