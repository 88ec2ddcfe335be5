"""Plans for tests, from lists."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from albireo.ipc.plan import (
    SECTIONS,
    TAKE_WORDS,
    Int32Array,
    PlanSections,
    PlanView,
    plan_bytes,
    write_plan,
)


def sections_of(**rows: Sequence[Any]) -> PlanSections:
    """Sections by name; the words that a take lacks are 0."""
    return PlanSections(*(_section(name, width, rows.pop(name, ())) for name, width in SECTIONS))


def _section(name: str, width: int, rows: Sequence[Any]) -> Int32Array:
    if name == "take":
        rows = [[*row, *[0] * (TAKE_WORDS - len(row))] for row in rows]
    return np.array(rows, np.int32).reshape((-1, width) if width > 1 else -1)


def plan_of(
    max_num_seqs: int,
    max_num_batched_tokens: int,
    block_size: int,
    max_model_len: int,
    *,
    step: int = 0,
    flags: int = 0,
    **rows: Sequence[Any],
) -> PlanView:
    """A plan as a reader of its ring sees it."""
    nbytes = plan_bytes(max_num_seqs, max_num_batched_tokens, block_size, max_model_len)
    frame = memoryview(bytearray(nbytes))
    length = write_plan(frame, step, flags, sections_of(**rows))
    return PlanView(frame[:length].toreadonly())
