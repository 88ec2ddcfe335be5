"""What check_answers lets pass and what not.  Needs no GPU, and runs where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ..workers.sampling_reference import Filters, draw, params_of, rows_of
from .near_ties import CLOSE, check_answers, drawn_by, logits_alone

PROMPT = [4, 0, 7]


def rows(count: int = 60) -> torch.Tensor:
    """Logits behind PROMPT and an answer of so many tokens."""
    return 3 * torch.randn(len(PROMPT) + count, 50, generator=torch.Generator().manual_seed(1))


def test_the_best_tokens_are_right_and_any_other_is_not() -> None:
    logits = rows()
    answer = logits[len(PROMPT) - 1 : -1].argmax(1).tolist()
    check_answers([PROMPT], [answer], [logits], [logits_alone])
    answer[20] = int(logits[len(PROMPT) - 1 + 20].topk(2).indices[1])
    with pytest.raises(AssertionError, match=f"answer 0, position 20: {answer[20]}, but"):
        check_answers([PROMPT], [answer], [logits], [logits_alone])


@pytest.mark.parametrize(("lead", "right"), [(0.5 * CLOSE, True), (2 * CLOSE, False)])
def test_one_that_is_as_good_is_right(lead: float, right: bool) -> None:
    logits = rows()
    answer = logits[len(PROMPT) - 1 : -1].argmax(1).tolist()
    row = logits[len(PROMPT) - 1 + 20]
    best, answer[20] = answer[20], (answer[20] + 1) % 50
    row[answer[20]] = row[best] - lead
    if right:
        check_answers([PROMPT], [answer], [logits], [logits_alone])
    else:
        with pytest.raises(AssertionError, match="position 20"):
            check_answers([PROMPT], [answer], [logits], [logits_alone])


def test_a_reference_that_is_seldom_sure_is_none() -> None:
    logits = rows().mul(CLOSE / 100)
    answer = logits[len(PROMPT) - 1 : -1].argmax(1).tolist()
    with pytest.raises(AssertionError, match=r"\(60, 60\)"):
        check_answers([PROMPT], [answer], [logits], [logits_alone])


def test_what_is_drawn() -> None:
    """By the sampler's own draws, and not by those of another seed."""
    logits, count = rows(), 60
    at = np.arange(count) + len(PROMPT)
    params = params_of(Filters(temperature=0.7), seeds=[9])
    drawn = draw(logits[len(PROMPT) - 1 : -1].numpy(), rows_of([0] * count, at), params)
    check_answers([PROMPT], [drawn.tolist()], [logits], [drawn_by(0.7, 9)])
    with pytest.raises(AssertionError, match="is better by"):
        check_answers([PROMPT], [drawn.tolist()], [logits], [drawn_by(0.7, 10)])
