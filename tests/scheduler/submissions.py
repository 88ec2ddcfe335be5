"""Requests for tests of the policy, and what has to come of each.

A token depends on its request's seed and its position alone, so a test knows
every answer beforehand; sequences of one seed are equal, and others can share
their first tokens.
"""

from __future__ import annotations

import numpy as np

from albireo.ipc.messages import Submit
from albireo.ipc.plan import EDIT_BAN_UNTIL, EDIT_BIAS
from albireo.ipc.stopping import end_of_tokens

VOCAB_SIZE = 13


def token_at(seed: int, position: int) -> int:
    """The model: the token at a position, prompt included, by the seed alone.

    Sequences of one seed are equal.  seed = 1000 x n + own: the first n tokens
    are those of seed 0, so that others share them.
    """
    common, own = divmod(seed, 1000)
    if position < common:
        own = 0
    return ((own * 0x9E3779B1 + position * 0x85EBCA6B) >> 7) % VOCAB_SIZE


def submission(
    request: int,
    prompt_len: int = 4,
    max_tokens: int = 4,
    *,
    seed: int | None = None,
    **how: object,
) -> Submit:
    """A request whose prompt, too, is the model's own tokens.

    resumed (of `how`): so many tokens of its answer are given with the prompt.
    """
    seed = request if seed is None else seed
    given = prompt_len + int(how.get("resumed", 0))  # type: ignore[call-overload]
    values: dict[str, object] = {
        "min_tokens": 0, "temperature": 0.5, "top_k": 7, "top_p": 0.25, "min_p": 0.125,
        "stop": (), "stop_token_ids": (), "include_stop": False, "skip_special_tokens": True,
    }  # fmt: skip
    return Submit(
        request=request,
        prompt_ids=[token_at(seed, position) for position in range(given)],
        max_tokens=max_tokens,
        seed=seed,
        **(values | how),  # type: ignore[arg-type]
    )


def expected_end(submit: Submit) -> tuple[str, list[int]]:
    """(reason, generated tokens) of a request that nobody disturbs; resumed ones not among them."""
    tokens: list[int] = []
    reason = None
    while reason is None:
        tokens.append(token_at(submit.seed, len(submit.prompt_ids) + len(tokens)))
        reason = end_of_tokens(
            tokens[-1],
            submit.resumed + len(tokens),
            submit.min_tokens,
            submit.max_tokens,
            frozenset(submit.stop_token_ids),
        )
    return reason, tokens


def expected_edits(submit: Submit) -> list[tuple[int, int, int]]:
    """(kind, token, value) of the edits that these tests use."""
    edits = [
        (EDIT_BIAS, token, int(np.float32(bias).view(np.int32)))
        for token, bias in submit.logit_bias.items()
    ]
    if submit.min_tokens:
        edits += [(EDIT_BAN_UNTIL, token, 0) for token in submit.stop_token_ids]
    return edits
