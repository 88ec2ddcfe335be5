"""The plans a GPU worker runs before it captures graphs and says that it is ready.

They are the worst that the budgets allow: as many rows as a step may have, once
in one long chunk and once in as many sampling sequences as there are slots, and
a mixed step.  Every sequence has all sampling parameters, and as much is scored as
can be.  What fits then always fits; kernels are compiled on the way.  Nothing of
them remains, as in warm_up.py.
"""

from __future__ import annotations

import numpy as np

from ....ipc.config import EngineConfig, blocks_for
from ....ipc.plan import (
    COPY_BLOCK,
    COPY_OUT,
    EDIT_ALLOW,
    EDIT_BAD_WORD,
    EDIT_BAN_UNTIL,
    EDIT_BIAS,
    MAX_PLAN_SCORES,
    MAX_TOP_LOGPROBS,
    TAKE_ALLOWS,
    TAKE_COUNTS,
    TAKE_EDITS,
    TAKE_FLAGS,
    TAKE_LOGPROBS,
    TAKE_PRESENCE,
    TAKE_PROMPT_LEN,
    TAKE_REPETITION,
    TAKE_SLOT,
    TAKE_TEMPERATURE,
    TAKE_TOP_K,
    TAKE_TOP_P,
    TAKE_WORDS,
    PlanSections,
    PlanView,
    plan_bytes,
    write_plan,
)

_EDITS = (EDIT_BIAS, EDIT_ALLOW, EDIT_BAN_UNTIL, EDIT_BAD_WORD)


def profile_plans(engine: EngineConfig) -> list[PlanView]:
    """In this order: one long chunk, many sampling chunks, a decode of every slot, a mixed step.

    engine.num_blocks: KV blocks that have memory, any number.
    """
    rows = engine.max_num_batched_tokens
    longest = min(rows, engine.max_model_len - 1)
    if longest < 1:
        return []
    many = min(engine.max_num_seqs, rows)
    lengths = [min(longest, rows // many + (1 if i < rows % many else 0)) for i in range(many)]
    plans = [_prefill(engine, [longest], []), _prefill(engine, lengths, [])]
    # The slots of the last plan hold their prompts and may go on by one token.
    going_on = list(range(many)) if max(lengths) < engine.max_model_len else []
    if going_on:
        plans.append(_prefill(engine, [], going_on))
    if len(going_on) > 1 and max(lengths) + 1 < engine.max_model_len:
        # Slot 0 begins anew; every other goes on.
        plans.append(_prefill(engine, [min(longest, rows - many + 1)], going_on[1:]))
    return plans


def _prefill(engine: EngineConfig, lengths: list[int], decode: list[int]) -> PlanView:
    """Slots 0, 1, ... begin with prompts of these lengths and sample; `decode` goes on."""
    count, block_size = len(lengths), engine.block_size
    take = np.zeros((count, TAKE_WORDS), np.int32)
    take[:, TAKE_SLOT] = np.arange(count)
    take[:, TAKE_TEMPERATURE] = np.float32(0.8).view(np.int32)
    take[:, TAKE_TOP_P] = np.float32(0.95).view(np.int32)
    take[:, TAKE_TOP_K] = 50
    take[:, TAKE_PROMPT_LEN] = lengths
    take[:, TAKE_REPETITION] = np.float32(1.1).view(np.int32)
    take[:, TAKE_PRESENCE] = np.float32(0.5).view(np.int32)
    take[:, TAKE_FLAGS] = TAKE_COUNTS | TAKE_EDITS | TAKE_ALLOWS
    take[:, TAKE_LOGPROBS] = 1 + MAX_TOP_LOGPROBS
    appends = [
        (slot, index, 0)
        for slot, length in enumerate(lengths)
        for index in range(blocks_for(length, block_size))
    ]
    append = np.array(appends, np.int32).reshape(-1, 3)
    # There may be fewer blocks than rows; what the cache holds does not matter here.
    append[:, 2] = np.arange(len(append)) % engine.num_blocks
    chunk = np.array([(slot, 0, n, 1) for slot, n in enumerate(lengths)], np.int32).reshape(-1, 4)
    token = np.zeros(sum(lengths), np.int32)
    frame = memoryview(
        bytearray(
            plan_bytes(
                engine.max_num_seqs,
                engine.max_num_batched_tokens,
                block_size,
                engine.max_model_len,
            )
        )
    )
    edit = np.array([(0, kind, 0, 0) for kind in _EDITS if count], np.int32).reshape(-1, 4)
    history = np.array([(0, 0, 1)] if count else [], np.int32).reshape(-1, 3)
    score = np.array([(row, 0) for row in range(min(MAX_PLAN_SCORES, len(token)))], np.int32)
    sections = PlanSections(
        take, append, chunk, token, np.array(decode, np.int32), edit, history,
        token[: len(history)], score=score.reshape(-1, 2), copy=_copies(engine),
    )  # fmt: skip
    write_plan(frame, 0, 0, sections)
    return PlanView(frame)


def _copies(engine: EngineConfig) -> np.ndarray:
    """A block in the cache, one to host memory."""
    copies = [(COPY_BLOCK, 0, 1)] if engine.num_blocks > 1 else []
    copies += [(COPY_OUT, 0, 0)] if engine.num_swap_blocks else []
    return np.array(copies, np.int32).reshape(-1, 3)
