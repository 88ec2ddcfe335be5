"""Machine code of all that sampling does, made (or loaded from numba's cache) before a fork."""

from __future__ import annotations

import numpy as np
import torch

from ...ipc.plan import (
    EDIT_WORDS,
    HISTORY_WORDS,
    TAKE_COUNTS,
    TAKE_FLAGS,
    TAKE_WORDS,
    PlanSections,
    PlanView,
    plan_bytes,
    write_plan,
)
from ..parallel.communicator import SingleRank
from .edits import SlotEdits
from .filters import BLOCK
from .logprobs import Logprobs
from .masks import mask_rows
from .params import SampleRows, SlotParams
from .sampler import Sampler
from .vocab import VocabSampler

_VOCAB_SIZE = 8 * BLOCK


def compile_all(several_ranks: bool = True) -> None:
    """Runs each kernel on two rows, with the types that the engine runs it with.

    several_ranks: also what only ranks of a group with others need.
    """
    alone = SingleRank()
    params = SlotParams.zeros(2)
    params.temperature[1] = 1.0
    params.top_k[1] = 4
    params.top_p[1] = 0.5
    params.min_p[1] = 0.1
    slots = np.arange(2, dtype=np.int32)
    rows = SampleRows(slots=slots, requests=slots, positions=slots)
    logits = torch.zeros(2, _VOCAB_SIZE)
    edits = SlotEdits(2, _VOCAB_SIZE)
    edits.apply_plan(_plan())
    edits.apply(logits.numpy(), rows)
    mask_rows(
        logits.numpy(), slots, np.full((2, _VOCAB_SIZE // 32), -1, np.int32),
        np.ones(2, np.bool_), 0,
    )  # fmt: skip
    tokens = Sampler(_VOCAB_SIZE, 2, alone).sample(logits, rows, params)
    if several_ranks:
        VocabSampler(_VOCAB_SIZE, 2, alone).sample(logits.numpy(), rows, params, tokens)
    edits.count(rows, tokens)
    Logprobs(_VOCAB_SIZE, 2, alone).describe(logits, tokens, slots)


def _plan() -> PlanView:
    """A slot that asks, with an edit and a history."""
    take = np.zeros((1, TAKE_WORDS), np.int32)
    take[0, TAKE_FLAGS] = TAKE_COUNTS
    sections = PlanSections(
        take=take,
        edit=np.zeros((1, EDIT_WORDS), np.int32),
        history=np.zeros((1, HISTORY_WORDS), np.int32),
    )
    frame = memoryview(bytearray(plan_bytes(2, 2, 2, 2)))
    write_plan(frame, 0, 0, sections)
    return PlanView(frame)
