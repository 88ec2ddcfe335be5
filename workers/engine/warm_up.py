"""The plans a worker runs before it says that it is ready.

They use slot 0 and the first blocks.  Nothing of them remains: a plan takes a
slot before it uses it, and attention reads nothing beyond a context.
"""

from __future__ import annotations

import numpy as np

from ...ipc.config import EngineConfig
from ...ipc.plan import (
    TAKE_PROMPT_LEN,
    TAKE_TEMPERATURE,
    TAKE_TOP_P,
    TAKE_WORDS,
    PlanSections,
    PlanView,
    plan_bytes,
    write_plan,
)

_MOST_TOKENS = 32


def warm_up_plans(engine: EngineConfig) -> list[PlanView]:
    """A prefill of a few tokens, which samples with top-p, and a decode after it."""
    length = min(
        _MOST_TOKENS,
        engine.max_num_batched_tokens,
        engine.max_model_len - 1,
        engine.num_blocks * engine.block_size - 1,
    )
    if length < 1:
        return []
    take = np.zeros((1, TAKE_WORDS), np.int32)
    take[0, [TAKE_TEMPERATURE, TAKE_TOP_P]] = np.array([1.0, 0.9], np.float32).view(np.int32)
    take[0, TAKE_PROMPT_LEN] = length
    blocks = np.arange(length // engine.block_size + 1, dtype=np.int32)
    append = np.stack([np.zeros_like(blocks), blocks, blocks], axis=1)
    chunk = np.array([[0, 0, length, 1]], np.int32)
    token = np.zeros(length, np.int32)
    slot = np.zeros(1, np.int32)
    return [
        _plan(engine, take, append, chunk, token, slot[:0]),
        _plan(engine, take[:0], append[:0], chunk[:0], token[:0], slot),
    ]


def _plan(engine: EngineConfig, *sections: np.ndarray) -> PlanView:
    frame = memoryview(
        bytearray(
            plan_bytes(
                engine.max_num_seqs,
                engine.max_num_batched_tokens,
                engine.block_size,
                engine.max_model_len,
            )
        )
    )
    write_plan(frame, 0, 0, PlanSections(*sections))
    return PlanView(frame)
