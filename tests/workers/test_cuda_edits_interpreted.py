"""Penalties, biases, bans and their tables on the GPU, in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .interpreted import use_interpreter

use_interpreter()

from albireo.ipc.plan import MAX_PLAN_EDITS, TAKE_ALLOWS, TAKE_COUNTS, TAKE_EDITS  # noqa: E402
from albireo.workers.sampling.cuda.edit_tables import IN_PROMPT, KIND_SHIFT, EditTables  # noqa: E402
from albireo.workers.sampling.cuda.edits import edit  # noqa: E402

from .cuda_edit_checks import Story  # noqa: E402


@pytest.mark.parametrize(
    ("seed", "steps", "rank", "ranks"), [(0, 12, 0, 1), (2, 6, 1, 2), (3, 6, 2, 3)]
)
def test_edited_logits_and_tables_are_those_of_a_plain_list(
    seed: int, steps: int, rank: int, ranks: int
) -> None:
    """Prompts in chunks behind histories, decodes, resumed requests, slots used again."""
    story = Story(seed, 330, "cpu", rank, ranks)
    for _ in range(steps):
        story.step()


def _tables(width: int, flags: int) -> EditTables:
    tables = EditTables(2, width, 0, 64, "cpu")
    tables.flags[0] = flags
    return tables


def _see(tables: EditTables, token: int, count: int) -> None:
    tables.counts[0, token] = count
    tables.seen[0, tables.num_seen[0]] = token
    tables.num_seen[0] += 1


def _edit(tables: EditTables, logits: torch.Tensor, position: int = 0) -> np.ndarray:
    slots = torch.zeros(len(logits), dtype=torch.int32)
    edit(logits, slots, slots + position, tables)
    return logits.float().numpy()


def test_many_edits_of_one_request() -> None:
    """A bias and a ban of one token are far apart, and the ban wins."""
    width, count = 64, 1200
    tables = _tables(width, TAKE_EDITS)
    head = torch.arange(count, dtype=torch.int32) % width
    tables.rows[0, :count, 0] = head
    tables.rows[0, 0, 0] = (2 << KIND_SHIFT) | 63
    tables.rows[0, :count, 1] = 0
    tables.rows[0, count - 1] = torch.from_numpy(
        np.array([63, np.float32(5).view(np.int32)], np.int32)
    )
    tables.row_count[0] = count
    tables.until[0] = 9
    assert count < MAX_PLAN_EDITS
    assert _edit(tables, torch.ones(1, width), position=8)[0, 63] == -np.inf
    assert _edit(tables, torch.ones(1, width), position=9)[0, 63] == 6


def test_broken_logits_stay_broken() -> None:
    """Whatever bans a token: its NaN or +inf is the model's, and the sampler is to see it."""
    tables = _tables(32, TAKE_COUNTS | TAKE_EDITS | TAKE_ALLOWS)
    tables.until[0] = 9
    tables.repetition[0] = 2.0
    tables.allowed[0, 0] = 1 << 5
    _see(tables, 1, IN_PROMPT)
    tables.rows[0, :2, 0] = (2 << KIND_SHIFT) | torch.tensor([3, 4], dtype=torch.int32)
    tables.row_count[0] = 2
    for token in (1, 3, 7):
        for value in (np.nan, np.inf):
            logits = torch.ones(1, 32)
            logits[0, token] = value
            found = _edit(tables, logits)[0]
            assert np.isnan(found[token]) if np.isnan(value) else found[token] == np.inf
            assert found[5] == 1 and np.isneginf(np.delete(found, [token, 5])).all()


def test_rows_without_flags_are_not_touched_and_bfloat16_is_rounded_once() -> None:
    tables = _tables(40, TAKE_COUNTS)
    tables.presence[0] = 1e-3
    _see(tables, 32, 3)
    _see(tables, 7, IN_PROMPT)
    tables.frequency[0] = 0.5
    logits = torch.full((1, 40), 2.0, dtype=torch.bfloat16)
    expected = torch.full((1, 40), 2.0, dtype=torch.bfloat16)
    expected[0, 32] = torch.tensor(2.0 - 1.5 - 1e-3).bfloat16()
    assert np.array_equal(_edit(tables, logits), expected.float().numpy())
    before = torch.randn(3, 40)
    after = before.clone()
    edit(after, torch.ones(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32), tables)
    assert torch.equal(after, before)


def test_logits_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit tables of 40 contiguous tokens"):
        _edit(_tables(40, 0), torch.zeros(1, 41))
