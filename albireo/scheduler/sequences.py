"""What the scheduler knows of each slot, in arrays: plain decodes touch no object.

The lengths of a slot are all in tokens from its first position:

    prefill_len   tokens known when it got the slot; prefill until they are planned
    planned       positions that are in the cache or that plans cover, ahead of the results
    length        tokens known by now: prompt and results
    end_len       most tokens it may have; the last one is never computed, so
                  its last token is planned when planned == end_len - 1

rank and arrival are the request's, for the choice of whom to preempt.
`request` is 0 where rows of results are not wanted any more: the slot is free,
or waits for its last step.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from albireo.ipc.plan import TAKE_SLOT, Int32Array

from .blocks import Slots
from .requests import Request

_NO_TOKEN = -1
_LINE = 16  # int32 words of a cache line


class Sequences:
    """The slots: arrays indexed by slot number, and the Request in each."""

    def __init__(self, slots: int, max_model_len: int) -> None:
        def column() -> Int32Array:
            return np.zeros(slots, dtype=np.int32)

        self.request = column()
        self.prefill_len = column()
        self.planned = column()
        self.length = column()
        self.min_len = column()
        self.end_len = column()
        self.last_step: npt.NDArray[np.int64] = np.zeros(slots, dtype=np.int64)
        self.rank: npt.NDArray[np.int64] = np.zeros(slots, dtype=np.int64)
        self.arrival: npt.NDArray[np.int64] = np.zeros(slots, dtype=np.int64)
        # The pages of a slot become resident when its tokens reach them.  Rows are an odd number
        # of cache lines apart: a column of them does not fall on the same few sets of a cache.
        lines = -(-max_model_len // _LINE) | 1
        rows: Int32Array = np.empty((slots, lines * _LINE), dtype=np.int32)
        self.tokens: Int32Array = rows[:, :max_model_len]
        self._stop_ids: Int32Array = np.empty((0, slots), dtype=np.int32)
        self._occupants: list[Request | None] = [None] * slots
        self._free = list(range(slots - 1, -1, -1))

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    def occupant(self, slot: int) -> Request:
        """The request that holds the slot, also while it waits for its last step."""
        request = self._occupants[slot]
        if request is None:
            raise RuntimeError(f"slot {slot} is free")
        return request

    def place(self, request: Request, cached: int) -> int:
        """Gives a request a free slot; nothing is planned yet beyond its `cached` tokens."""
        slot = self._free.pop()
        self._occupants[slot] = request
        request.slot = slot
        request.take[TAKE_SLOT] = slot
        length = len(request.tokens)
        self.request[slot] = request.number
        self.prefill_len[slot] = self.length[slot] = length
        self.planned[slot] = cached
        self.rank[slot] = request.rank
        self.arrival[slot] = request.arrival
        self.min_len[slot] = request.min_len
        self.end_len[slot] = request.end_len
        self.tokens[slot, :length] = request.tokens
        self._set_stop_ids(slot, request.stop_ids)
        return slot

    def vacate(self, slot: int) -> None:
        """Frees a slot: no step in flight names it."""
        self.occupant(slot).slot = -1
        self._occupants[slot] = None
        self.request[slot] = 0
        self._free.append(slot)

    def save_tokens(self, slot: int) -> None:
        """Copies a slot's tokens to its request, which is to wait again."""
        self.occupant(slot).tokens = self.tokens[slot, : self.length[slot]].copy()

    def by_importance(self, slots: Slots) -> Slots:
        """The slots, the one with the most important request first."""
        return slots[np.lexsort((self.arrival[slots], self.rank[slots]))]

    def accept(self, slots: Slots, tokens: Int32Array) -> tuple[Int32Array, npt.NDArray[np.bool_]]:
        """Adds one token to each of these slots.

        Returns their lengths [n], and [n] bool: by its tokens the request has
        ended.  That is ipc.stopping.end_of_tokens for whole arrays.
        """
        length = self.length[slots]
        self.tokens[slots, length] = tokens
        length += 1
        self.length[slots] = length
        ended: npt.NDArray[np.bool_] = length >= self.end_len[slots]
        if len(self._stop_ids):
            stopped = (self._stop_ids[:, slots] == tokens).any(axis=0)
            ended |= stopped & (length >= self.min_len[slots])
        return length, ended

    def _set_stop_ids(self, slot: int, stop_ids: frozenset[int]) -> None:
        missing = len(stop_ids) - len(self._stop_ids)
        if missing > 0:
            rows = np.full((missing, self._stop_ids.shape[1]), _NO_TOKEN, dtype=np.int32)
            self._stop_ids = np.concatenate([self._stop_ids, rows])
        self._stop_ids[:, slot] = _NO_TOKEN
        self._stop_ids[: len(stop_ids), slot] = list(stop_ids)
