"""What the scheduler knows of each request, and of each slot that one holds.

A Request is a Python object while it waits.  In a slot its numbers are entries
of arrays, so that a step of plain decodes touches no object.  The lengths of a
slot are all in tokens from its first position:

    prefill_len   tokens known when it got the slot; prefill until they are planned
    planned       positions that plans cover, ahead of the results
    length        tokens known by now: prompt and results
    end_len       most tokens it may have; the last one is never computed, so
                  its last token is planned when planned == end_len - 1

`request` is 0 where rows of results are not wanted any more: the slot is free,
or waits for its last step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from albireo.ipc.messages import Submit
from albireo.ipc.plan import (
    TAKE_MIN_P,
    TAKE_PROMPT_LEN,
    TAKE_REQUEST,
    TAKE_SEED_HI,
    TAKE_SEED_LO,
    TAKE_SLOT,
    TAKE_TEMPERATURE,
    TAKE_TOP_K,
    TAKE_TOP_P,
    TAKE_WORDS,
    Int32Array,
    split64,
)

from .blocks import Slots

_NO_TOKEN = -1


@dataclass(slots=True, eq=False)
class Request:
    """A request from its submission to its end.

    arrival: grows with each submission, and orders all requests.
    tokens: int32, prompt and generated tokens; complete only while it waits.
    min_len, end_len: tokens (prompt included) from which stop tokens count, and
        at which it ends.
    take: the plan's words for it; the slot is filled in when it gets one.
    slot: -1 while it waits.
    """

    number: int
    arrival: int
    tokens: Int32Array
    prompt_len: int
    min_len: int
    end_len: int
    stop_ids: frozenset[int]
    take: Int32Array
    slot: int = -1
    preemptions: int = 0


def new_request(submit: Submit, arrival: int) -> Request:
    """The scheduler's view of a submission."""
    prompt_len = len(submit.prompt_ids)
    take = np.zeros(TAKE_WORDS, dtype=np.int32)
    take[TAKE_REQUEST] = submit.request
    take[TAKE_SEED_LO], take[TAKE_SEED_HI] = split64(submit.seed)
    floats = take.view(np.float32)
    floats[TAKE_TEMPERATURE] = submit.temperature
    floats[TAKE_TOP_P] = submit.top_p
    floats[TAKE_MIN_P] = submit.min_p
    take[TAKE_TOP_K] = submit.top_k
    take[TAKE_PROMPT_LEN] = prompt_len
    return Request(
        number=submit.request,
        arrival=arrival,
        tokens=np.array(submit.prompt_ids, dtype=np.int32),
        prompt_len=prompt_len,
        min_len=prompt_len + submit.min_tokens,
        end_len=prompt_len + submit.max_tokens,
        stop_ids=frozenset(submit.stop_token_ids),
        take=take,
    )


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
        # The pages of a slot become resident when its tokens reach them.
        self.tokens: Int32Array = np.empty((slots, max_model_len), dtype=np.int32)
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

    def place(self, request: Request) -> int:
        """Gives a request a free slot, with nothing of it planned yet."""
        slot = self._free.pop()
        self._occupants[slot] = request
        request.slot = slot
        request.take[TAKE_SLOT] = slot
        length = len(request.tokens)
        self.request[slot] = request.number
        self.prefill_len[slot] = self.length[slot] = length
        self.planned[slot] = 0
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

    def accept(self, slots: Slots, tokens: Int32Array) -> npt.NDArray[np.bool_]:
        """Adds one token to each of these slots; [n] bool: by its tokens the request has ended.

        This is ipc.stopping.end_of_tokens for whole arrays.
        """
        length = self.length[slots]
        self.tokens[slots, length] = tokens
        length += 1
        self.length[slots] = length
        ended: npt.NDArray[np.bool_] = (self._stop_ids[:, slots] == tokens).any(axis=0)
        ended &= length >= self.min_len[slots]
        ended |= length >= self.end_len[slots]
        return ended

    def _set_stop_ids(self, slot: int, stop_ids: frozenset[int]) -> None:
        missing = len(stop_ids) - len(self._stop_ids)
        if missing > 0:
            rows = np.full((missing, self._stop_ids.shape[1]), _NO_TOKEN, dtype=np.int32)
            self._stop_ids = np.concatenate([self._stop_ids, rows])
        self._stop_ids[:, slot] = _NO_TOKEN
        self._stop_ids[: len(stop_ids), slot] = list(stop_ids)
