"""When a request ends by its tokens: one rule, evaluated alike wherever it is needed.

The scheduler frees by it and the detokenizer shows by it.  Both see the same
result rows in the same order, so they agree without a word to each other.
(Stop strings need text: they are the detokenizer's alone, which aborts the
request at the scheduler.)
"""

from __future__ import annotations


def end_of_tokens(
    token: int, generated: int, min_tokens: int, max_tokens: int, stop_token_ids: frozenset[int]
) -> str | None:
    """Why a request ends with `token`, its `generated`-th new token (1-based), or None.

    A stop token before `min_tokens` does not count; "stop" beats "length".
    """
    if generated >= min_tokens and token in stop_token_ids:
        return "stop"
    if generated >= max_tokens:
        return "length"
    return None
