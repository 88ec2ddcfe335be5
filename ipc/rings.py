"""The two rings of a group: the one place that names and sizes them.

The supervisor creates them, the group's processes attach to them, all from the
same EngineConfig.  At most lookahead + 1 steps are without a result and a ring
holds twice that, so a full ring is a fault, not a wait.  That leaves room for a
GPU that reads plans from their frames: it has read those of steps with a
result, and whoever launches the next step then gives their frames back.
"""

from __future__ import annotations

from .config import EngineConfig
from .plan import plan_bytes, result_bytes
from .ring import RingSpec


def plan_ring(group: int, engine: EngineConfig) -> RingSpec:
    """Scheduler to the ranks; readers "worker0", "worker1", ..."""
    return RingSpec(
        name=f"g{group}.plan",
        frames=_frames(engine),
        frame_bytes=plan_bytes(
            engine.max_num_seqs,
            engine.max_num_batched_tokens,
            engine.block_size,
            engine.max_model_len,
        ),
        readers=tuple(f"worker{rank}" for rank in range(engine.tp)),
    )


def result_ring(group: int, engine: EngineConfig) -> RingSpec:
    """Rank 0 to "scheduler" and "detokenizer"."""
    return RingSpec(
        name=f"g{group}.result",
        frames=_frames(engine),
        frame_bytes=result_bytes(engine.max_num_seqs),
        readers=("scheduler", "detokenizer"),
    )


def _frames(engine: EngineConfig) -> int:
    return 2 * (engine.lookahead + 1)
