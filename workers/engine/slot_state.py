"""What a worker remembers of every slot between steps, and what a plan does to it.

Used by both engines: SlotTable (slots.py) adds block tables and the model's
input, SimEngine (sim.py) needs no more than this.  No torch here.

    take     the slot belongs to a new request, whose position is `start`
    chunk    positions start .. start+length-1 are fed; position = start+length
    decode   the last token is fed at the position, which moves on by one

Invariant between steps: `position` tokens of the slot's sequence are in the
KV cache, and `last_token`, once it has been sampled, is the one after them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...ipc.plan import (
    TAKE_LOGPROBS,
    TAKE_MIN_P,
    TAKE_REQUEST,
    TAKE_SEED_LO,
    TAKE_SLOT,
    TAKE_START,
    TAKE_TEMPERATURE,
    TAKE_TOP_K,
    TAKE_TOP_P,
    PlanView,
)
from ..sampling.params import SampleRows, ScoreRows, SlotParams

Int32Array = npt.NDArray[np.int32]


class SlotState:
    """request, position, last_token, logprobs: [slots] int32, by slot; params likewise.

    logprobs: as TAKE_LOGPROBS.

    rows: the sampling rows of the last plan; views that the next plan overwrites.
    """

    def __init__(self, slots: int) -> None:
        self.params = SlotParams.zeros(slots)
        self.request = np.zeros(slots, np.int32)
        self.position = np.zeros(slots, np.int32)
        self.last_token = np.zeros(slots, np.int32)
        self.logprobs = np.zeros(slots, np.int32)
        # A uint64 as its two words, low word first, as a plan carries it.
        self._seed_words = self.params.seed.view(np.int32).reshape(-1, 2)
        self._slots = np.zeros(slots, np.int32)
        self._requests = np.zeros(slots, np.int32)
        self._positions = np.zeros(slots, np.int32)
        self._result = np.zeros((slots, 3), np.int32)
        self.rows = self._first_rows(0)

    def take(self, take: Int32Array) -> None:
        """Gives slots to new requests; take: PlanView.take."""
        if not len(take):
            return
        slots = take[:, TAKE_SLOT]
        self.request[slots] = take[:, TAKE_REQUEST]
        self.position[slots] = take[:, TAKE_START]
        self.logprobs[slots] = take[:, TAKE_LOGPROBS]
        self._seed_words[slots] = take[:, TAKE_SEED_LO : TAKE_SEED_LO + 2]
        self.params.temperature[slots] = take[:, TAKE_TEMPERATURE].view(np.float32)
        self.params.top_k[slots] = take[:, TAKE_TOP_K]
        self.params.top_p[slots] = take[:, TAKE_TOP_P].view(np.float32)
        self.params.min_p[slots] = take[:, TAKE_MIN_P].view(np.float32)

    def advance(self, plan: PlanView) -> None:
        """Moves positions past the plan's chunks and decodes, and sets `rows`, which stay the same
        object where only positions have changed.

        Raises ValueError when a chunk does not start where its slot's cache ends.
        """
        if self._goes_on(plan):
            positions = self.rows.positions
            positions += 1
            self.position[self.rows.slots] = positions
            return
        sampling = self._advance_chunks(plan.chunk) if len(plan.chunk) else 0
        count = sampling + len(plan.decode)
        slots = self._slots[:count]
        positions = self._positions[:count]
        slots[sampling:] = plan.decode
        np.take(self.position, slots, out=positions)
        positions[sampling:] += 1
        self.position[slots] = positions
        np.take(self.request, slots, out=self._requests[:count])
        self.rows = self._first_rows(count)

    def scores(self, plan: PlanView) -> ScoreRows:
        """What the plan scores, after its takes."""
        slots, starts, lengths = plan.chunk[:, 0], plan.chunk[:, 1], plan.chunk[:, 2]
        ends = np.cumsum(lengths, dtype=np.int32)
        rows = plan.score[:, 0]
        chunk = np.searchsorted(ends, rows, side="right")
        return ScoreRows(
            requests=self.request[slots[chunk]],
            positions=rows - ends[chunk] + (starts + lengths)[chunk] + np.int32(1),
            tokens=plan.score[:, 1].copy(),
        )

    def commit(self, tokens: Int32Array) -> Int32Array:
        """Stores the tokens [R] of `rows`; returns the result rows [R, 3] (request, count, token).

        A negative token stands for a row without one, -1 - ROW_... (ipc/plan.py): its count
        is 0, its token the ROW_... .  The rows are valid until the next call.
        """
        result = self._result[: len(tokens)]
        result[:, 0] = self.rows.requests
        np.greater_equal(tokens, 0, out=result[:, 1], casting="unsafe")
        np.bitwise_xor(tokens, tokens >> 31, out=result[:, 2])
        self.last_token[self.rows.slots] = result[:, 2]
        return result

    def _goes_on(self, plan: PlanView) -> bool:
        """Whether the rows are those of the last plan, a token further."""
        return (
            not len(plan.chunk)
            and not len(plan.take)
            and np.array_equal(plan.decode, self.rows.slots)
        )

    def _advance_chunks(self, chunk: Int32Array) -> int:
        """Moves past the chunks; the slots of those that sample go to the first rows: how many."""
        slots, starts, lengths = chunk[:, 0], chunk[:, 1], chunk[:, 2]
        cached = self.position[slots]
        if not np.array_equal(cached, starts):
            wrong = int(np.flatnonzero(cached != starts)[0])
            raise ValueError(
                f"the plan's chunk for slot {slots[wrong]} starts at position {starts[wrong]}, "
                f"but the slot holds {cached[wrong]} tokens: the scheduler and the worker disagree"
            )
        self.position[slots] = starts + lengths
        sampling = slots[chunk[:, 3] != 0]
        self._slots[: len(sampling)] = sampling
        return len(sampling)

    def _first_rows(self, count: int) -> SampleRows:
        return SampleRows(
            slots=self._slots[:count],
            requests=self._requests[:count],
            positions=self._positions[:count],
        )
