"""Grammar masks on the GPU's logits, in Triton's interpreter, against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .interpreted import use_interpreter

use_interpreter()

from albireo.workers.sampling.cuda.masks import MaskTables, mask  # noqa: E402

from .mask_reference import ROWS, SHARDS, VOCAB, mask_case  # noqa: E402


@pytest.mark.parametrize(("rank", "ranks"), SHARDS)
def test_masked_logits(rank: int, ranks: int) -> None:
    case = mask_case(rank, ranks)
    width = case.logits.shape[1]
    tables = MaskTables(ROWS, VOCAB, case.first, "cpu")
    tables.masks[:3] = torch.from_numpy(case.masks)
    held = torch.from_numpy(case.rows[case.holds]).long()
    tables.mask_of_row[held] = torch.from_numpy(case.holds.nonzero()[0]).int()
    # Rows that are further apart than they are long.
    whole = torch.from_numpy(np.concatenate([case.logits, case.logits], axis=1))
    mask(whole[:, :width], tables)
    np.testing.assert_array_equal(whole[:, :width].numpy(), case.expected)
    np.testing.assert_array_equal(whole[:, width:].numpy(), case.logits)
