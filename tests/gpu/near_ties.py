"""What a node may answer: at each position a token that the reference has for the best, or one
whose score is so near to that as the last bits of a sum may move it.

A GPU sums in another order than a CPU, and two ranks in another than one.  So exactly the answers
of the reference would be too much to ask for, where two of its tokens are as good; but there, and
nowhere else, an answer may differ.  Each position is judged behind the answer's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from albireo.workers.sampling.draw import gumbel
from albireo.workers.sampling.philox import token_words

CLOSE = 1e-3
"""Of scores: twice what test_engine.py allows a logit to differ by."""
_MOST_TIES = 0.02
"""Of all positions: of a reference with more, a wrong answer might go unseen."""

Scores = Callable[[np.ndarray, list[int], list[int]], np.ndarray]
"""(logits [V] float32, prompt, what has been answered) -> what the next token is the best of."""


def logits_alone(logits: np.ndarray, prompt: list[int], output: list[int]) -> np.ndarray:
    """Scores of a greedy request."""
    return logits


def drawn_by(temperature: float, seed: int) -> Scores:
    """Of one that is sampled: see sampling/draw.py."""

    def scores(logits: np.ndarray, prompt: list[int], output: list[int]) -> np.ndarray:
        words = np.empty(-(-len(logits) // 4) * 4, np.uint32)
        token_words(np.uint64(seed), len(prompt) + len(output), 0, words)
        noise = np.array([gumbel(word) for word in words[: len(logits)]])
        return logits.astype(np.float64) / temperature + noise

    return scores


def check_answers(
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    logits: Sequence[torch.Tensor],
    scores: Sequence[Scores],
) -> None:
    """logits: the reference's, [tokens, V] of each prompt with its answer."""
    wrong: list[str] = []
    positions = ties = 0
    each = zip(prompts, answers, logits, scores, strict=True)
    for number, (prompt, answer, rows, score) in enumerate(each):
        assert answer and len(rows) == len(prompt) + len(answer)
        for at, token in enumerate(answer):
            row = score(rows[len(prompt) + at - 1].numpy(), prompt, answer[:at])
            second, best = np.sort(row)[-2:]
            positions += 1
            ties += int(best - second < CLOSE)
            if best - row[token] >= CLOSE:
                wrong.append(
                    f"answer {number}, position {at}: {token}, but {row.argmax()} is better by "
                    f"{best - row[token]:.3g}"
                )
    assert not wrong, wrong
    assert ties <= _MOST_TIES * positions, (ties, positions)
