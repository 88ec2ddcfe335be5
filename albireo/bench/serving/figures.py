"""What the answers add up to, in the words and keys that the field's benches use.

ttft    from sending a request to its first event with text
itl     between one event with text and the next (which may carry several tokens)
tpot    (e2el - ttft) / (new tokens - 1), of answers of two tokens and more
e2el    from sending to the last event of the answer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .connection import Answer

METRICS = ("ttft", "tpot", "itl", "e2el")


def seconds(answer: Answer) -> dict[str, float]:
    """ttft, tpot and e2el of one answer that has them."""
    found = {"ttft": answer.first - answer.began, "e2el": answer.last - answer.began}
    more = answer.new_tokens - 1
    if more > 0:
        found["tpot"] = (answer.last - answer.first) / more
    return found


def times(answers: Sequence[Answer]) -> dict[str, list[float]]:
    """Metric -> seconds of all answers that have them."""
    found: dict[str, list[float]] = {name: [] for name in METRICS}
    for answer in answers:
        if answer.has_times:
            for name, value in seconds(answer).items():
                found[name].append(value)
            found["itl"] += answer.gaps
    return found


def summary(
    answers: Sequence[Answer],
    input_lens: Sequence[int | None],
    wall_s: float,
    metrics: Sequence[str],
    percentiles: Sequence[float],
    goodput_ms: Mapping[str, float],
) -> dict[str, Any]:
    """Counts, rates, and mean, median, deviation and percentiles in ms.

    input_lens: tokens of each prompt where they are known and the server does not count.
    """
    whole = [(a, n) for a, n in zip(answers, input_lens, strict=True) if a.error is None]
    prompts = sum((n or 0) if a.prompt_tokens is None else a.prompt_tokens for a, n in whole)
    new = sum(answer.new_tokens for answer, _ in whole)
    result: dict[str, Any] = {
        "duration": round(wall_s, 3),
        "completed": len(whole),
        "failed": len(answers) - len(whole),
        "total_input_tokens": prompts,
        "total_output_tokens": new,
        "tokens_counted_by": "usage"
        if all(answer.completion_tokens is not None for answer, _ in whole)
        else "events",
        "request_throughput": round(len(whole) / wall_s, 3),
        "output_throughput": round(new / wall_s, 1),
        "total_token_throughput": round((prompts + new) / wall_s, 1),
    }
    if goodput_ms:
        good = sum(_is_good(answer, goodput_ms) for answer, _ in whole)
        result |= {
            "goodput_ms": dict(goodput_ms),
            "good": good,
            "request_goodput": round(good / wall_s, 3),
        }
    found = times(answers)
    for name in metrics:
        result |= _spread(name, np.asarray(found[name]) * 1e3, percentiles)
    return result


def _spread(name: str, values_ms: Any, percentiles: Sequence[float]) -> dict[str, float]:
    if not len(values_ms):
        return {}
    found = {
        f"mean_{name}_ms": values_ms.mean(),
        f"median_{name}_ms": np.median(values_ms),
        f"std_{name}_ms": values_ms.std(),
    }
    found |= {f"p{each:g}_{name}_ms": np.percentile(values_ms, each) for each in percentiles}
    return {key: round(float(value), 3) for key, value in found.items()}


def _is_good(answer: Answer, goodput_ms: Mapping[str, float]) -> bool:
    if not answer.has_times:
        return False
    its = seconds(answer)
    return all(its.get(name, 0.0) * 1e3 <= most for name, most in goodput_ms.items())
