"""What a step's sampling has to do: what none of its rows asks for is left out."""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np

from ....ipc.plan import (
    TAKE_COUNTS,
    TAKE_FLAGS,
    TAKE_GRAMMAR,
    TAKE_LOGPROBS,
    TAKE_SLOT,
    Int32Array,
)
from ...sampling.params import SlotParams

_DRAWS, _FILTERS, _EDITS, _LOGPROBS, _MASKS = 1, 2, 4, 8, 16


class SamplingKind(enum.IntEnum):
    """Of a row; a step has the highest of its rows."""

    GREEDY = 0
    PLAIN = 1
    """A temperature, and nothing that leaves tokens out."""
    FILTERED = 2
    """Top-k, top-p or min-p."""


class StepNeeds(NamedTuple):
    """Of a step.  edits, logprobs, masks: a row has edits, asks for logprobs, has a grammar."""

    kind: SamplingKind
    edits: bool
    logprobs: bool
    masks: bool = False


class SlotNeeds:
    """Of every slot, on the CPU: which graphs a step needs is known without asking the GPU."""

    def __init__(self, slots: int) -> None:
        self._bits = np.zeros(slots, np.int8)
        self._counts = np.zeros(slots, np.bool_)

    def take(self, take: Int32Array, params: SlotParams) -> None:
        """Slots given to requests; params: those of `take` included."""
        slots = take[:, TAKE_SLOT]
        filters = (params.top_k[slots] > 0) | (params.top_p[slots] < 1) | (params.min_p[slots] > 0)
        draws = params.temperature[slots] > 0
        self._bits[slots] = (
            draws * _DRAWS
            + (draws & filters) * _FILTERS
            + ((take[:, TAKE_FLAGS] & ~TAKE_GRAMMAR) != 0) * _EDITS
            + ((take[:, TAKE_FLAGS] & TAKE_GRAMMAR) != 0) * _MASKS
            + (take[:, TAKE_LOGPROBS] > 0) * _LOGPROBS
        )
        self._counts[slots] = (take[:, TAKE_FLAGS] & TAKE_COUNTS) != 0

    def of(self, slots: Int32Array) -> StepNeeds:
        """Of a step with sampling rows of these slots."""
        bits = int(np.bitwise_or.reduce(self._bits[slots])) if len(slots) else 0
        kind = SamplingKind.PLAIN if bits & _DRAWS else SamplingKind.GREEDY
        if bits & _FILTERS:
            kind = SamplingKind.FILTERED
        return StepNeeds(kind, bool(bits & _EDITS), bool(bits & _LOGPROBS), bool(bits & _MASKS))

    def asking(self, slots: Int32Array) -> Int32Array:
        """Which of these rows ask for logprobs: indices."""
        return np.flatnonzero(self._bits[slots] & _LOGPROBS).astype(np.int32)

    def counts(self, slots: Int32Array) -> bool:
        """Whether the tokens of one of these slots are counted."""
        return bool(self._counts[slots].any())
