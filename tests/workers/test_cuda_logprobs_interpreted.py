"""The GPU's logprobs against torch.log_softmax, in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .interpreted import use_interpreter

use_interpreter()

from .cuda_logprob_checks import check, records_of  # noqa: E402


@pytest.mark.parametrize(
    ("vocab", "dtype", "ranks", "scores"),
    [
        (1500, torch.float32, 1, False),
        (1500, torch.bfloat16, 1, True),
        (9002, torch.bfloat16, 2, False),
        (1203, torch.float32, 3, True),
    ],
)
def test_records(vocab: int, dtype: torch.dtype, ranks: int, scores: bool) -> None:
    check(vocab + ranks, vocab, "cpu", dtype, ranks, scores, rows=7)


def test_a_row_that_could_not_be_sampled_ends_too() -> None:
    """What its record holds is nobody's; the kernels only must not go astray."""
    logits = np.zeros((3, 600), np.float32)
    logits[0, 5] = np.nan
    logits[1] = -np.inf
    logits[2, 3] = np.inf
    records = records_of(logits, np.array([-1, -1, -1]), np.array([21, 21, 21]), "cpu")
    assert records.shape == (3, 44)
