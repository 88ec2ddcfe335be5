"""How many prompt tokens a step may have, beside decodes that wait for it.

Without decodes: as many as any step.  Beside them, with a target for the time between tokens:
what fits, as far as is known (step_times.py).  Else, beside few decodes, a step is filled to where
more rows cost the device in proportion (`mixed_step_tokens`), and prompts that come together are
spread over some steps: larger ones save next to nothing there, and make every stream wait, and
every prompt that comes meanwhile.  What would take long that way gets larger steps.  Where many
decode, chunks beside them would be small ones, which cost more than they spare anybody.
"""

from __future__ import annotations

from .limits import Limits
from .step_times import StepTimes

LEAST_SHARE = 16
"""Beside few decodes a step has a sixteenth of the prompts that are left, at least."""
_FEW = 8
"""Decodes are few up to an eighth of a step's tokens, so that chunks have the most of it."""


def chunk_budget(limits: Limits, times: StepTimes, decodes: int, prompt_tokens: int) -> int:
    """prompt_tokens: what is left of the prompts under way, and those that wait, as if nothing of
    them were in a cache.
    """
    most = limits.max_num_batched_tokens - decodes
    if not decodes:
        return most
    if limits.itl_target_ms:
        return min(most, times.chunk_tokens(limits.itl_target_ms * 1000))
    filled = limits.mixed_step_tokens
    if decodes * _FEW <= filled:
        return min(most, max(filled - decodes, -(-prompt_tokens // LEAST_SHARE)))
    return most
