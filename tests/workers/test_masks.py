"""Grammar masks on the CPU's logits, against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest

from albireo.workers.sampling.masks import mask_rows

from .mask_reference import SHARDS, mask_case


@pytest.mark.parametrize(("rank", "ranks"), SHARDS)
def test_masked_logits(rank: int, ranks: int) -> None:
    case = mask_case(rank, ranks)
    found = case.logits.copy()
    mask_rows(found, case.rows, case.masks, case.holds, case.first)
    np.testing.assert_array_equal(found, case.expected)
