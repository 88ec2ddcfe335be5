"""A profile from what `albireo bench step --json` and `albireo bench prefill --json` print.

    decode step of B rows at a mean context c     weights(B) + B * c * kv_token
    prompts of n tokens, P pairs                  n * prefill_token + P * pair

kv_token is the slope that fits best over all batches that were measured at more
than one context (bench step with another --input-len); weights(B) is what is
left of each batch, never less for more rows.  prefill_token and pair are the
least squares of all prompts, neither below 0.  What is not measured is 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from .profile import Profile, ProfileError


def fit_profile(name: str, benches: Iterable[dict[str, Any]]) -> Profile:
    """benches: decoded results.  Raises ProfileError when they say too little, or not the same."""
    decodes: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
    prompts: list[tuple[int, float, float]] = []
    settings: set[tuple[str, ...]] = set()
    for bench in benches:
        try:
            settings.add(tuple(str(bench[each]) for each in ("shape", "device", "dtype", "groups")))
            if bench["bench"] == "step":
                context = bench["input_len"] + bench["output_len"] / 2
                for row in bench["results"]:
                    decodes[row["batch"]].append((context, row["step_ms_median"]))
            elif bench["bench"] == "prefill":
                for row in bench["prompts"]:
                    count, length = row["prompts"], row["tokens"]
                    prompts.append((count * length, count * length * length / 2, row["ms"]))
        except (KeyError, TypeError) as error:
            raise ProfileError(
                f"this is no result of `bench step --json` or `bench prefill --json`: {error}"
            ) from None
    if len(settings) > 1:
        raise ProfileError(f"the results are of different things: {sorted(settings)}")
    if not decodes:
        raise ProfileError("no result of `bench step --json` is among them")
    kv_token_ms = _kv_token_ms(decodes)
    rows = sorted(decodes)
    left = [
        float(np.mean([ms - batch * context * kv_token_ms for context, ms in decodes[batch]]))
        for batch in rows
    ]
    rows_ms = np.maximum.accumulate(left).tolist()
    if not rows_ms[0] > 0:
        raise ProfileError(
            f"steps of {rows[0]} rows take less than their keys and values do "
            f"({kv_token_ms * 1e6:.1f} ns a token, by the others): the times are too unsteady"
        )
    prefill_token_ms, pair_ms = _prefill(prompts)
    (shape, device, dtype, groups) = next(iter(settings))
    return Profile(
        name=name,
        source=f"{shape} {dtype}, {device}, groups {groups}: fitted to "
        f"{sum(map(len, decodes.values()))} decode steps and {len(prompts)} prompts",
        rows=tuple(rows),
        rows_ms=tuple(round(each, 4) for each in rows_ms),
        prefill_token_us=round(prefill_token_ms * 1e3, 4),
        kv_token_ns=round(kv_token_ms * 1e6, 4),
        pair_ns=round(pair_ms * 1e6, 5),
        split=False,
    )


def _kv_token_ms(decodes: dict[int, list[tuple[float, float]]]) -> float:
    """The slope over tokens read, each batch with an offset of its own; 0 without two contexts."""
    along = across = 0.0
    for batch, points in decodes.items():
        tokens = batch * np.array([context for context, _ in points])
        ms = np.array([each for _, each in points])
        tokens = tokens - tokens.mean()
        along += float(tokens @ tokens)
        across += float(tokens @ (ms - ms.mean()))
    return max(0.0, across / along) if along else 0.0


def _prefill(prompts: list[tuple[int, float, float]]) -> tuple[float, float]:
    """Milliseconds of a token and of a pair."""
    if not prompts:
        return 0.0, 0.0
    table = np.array(prompts)
    # Relative errors: long prompts do not drown the short ones.
    weighted = table[:, :2] / table[:, 2:]
    both, *_ = np.linalg.lstsq(weighted, np.ones(len(table)), rcond=None)
    if len(table) > 1 and both.min() >= 0:
        return float(both[0]), float(both[1])
    tokens = weighted[:, 0]
    return float(tokens.sum() / (tokens @ tokens)), 0.0
