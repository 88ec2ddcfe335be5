"""From the options, the model and the machine to what a group runs with."""

from __future__ import annotations

import psutil

from albireo.ipc.config import EngineConfig, ModelInfo
from albireo.workers.parallel.slabs import shared_bytes

from .core_plan import CorePlan
from .options import NodeOptions, OptionError

_GIB = 1 << 30
_DEFAULT_KV_BYTES = 4 * _GIB
_KV_SHARE_OF_MEMORY = 0.25


def size_engine(
    options: NodeOptions, model_path: str, device: str, dtype: str, model: ModelInfo, tp: int,
    cores: CorePlan,
) -> EngineConfig:  # fmt: skip
    """Decides everything the actors of one group agree on.

    Raises OptionError, with the arithmetic, when the KV cache cannot hold one
    request of the longest length.
    """
    max_model_len = options.max_model_len or model.context_len
    if max_model_len > model.context_len:
        raise OptionError(
            f"--max-model-len {max_model_len} exceeds the model's context of {model.context_len}"
        )
    block_bytes = model.kv_bytes_per_token * options.block_size
    budget = _kv_budget_bytes(options, device)
    useful = options.max_num_seqs * -(-max_model_len // options.block_size)
    num_blocks = useful if device == "sim" else min(useful, budget // block_bytes)
    needed = -(-max_model_len // options.block_size)
    if num_blocks < needed:
        raise OptionError(
            f"the KV cache of a group, {budget / _GIB:.2f} GiB, holds {num_blocks} blocks of "
            f"{options.block_size} tokens ({block_bytes / 1024:.0f} KiB each), but one request of "
            f"{max_model_len} tokens needs {needed}: raise --kv-cache-gib to "
            f"{needed * block_bytes / _GIB:.2f} or lower --max-model-len to "
            f"{num_blocks * options.block_size}"
        )
    default_tokens = 512 if device == "cpu" else 2048
    batched = options.max_num_batched_tokens or max(default_tokens, options.max_num_seqs)
    if batched < options.max_num_seqs:
        raise OptionError(
            f"--max-num-batched-tokens {batched} is less than --max-num-seqs "
            f"{options.max_num_seqs}: every running sequence needs a token in each step"
        )
    return EngineConfig(
        model_path=model_path,
        device=device,
        dtype=dtype,
        load_format=options.load_format,
        tp=tp,
        max_model_len=max_model_len,
        block_size=options.block_size,
        num_blocks=int(num_blocks),
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=batched,
        lookahead=1 if options.async_scheduling else 0,
        batch_invariant=options.batch_invariant,
        step_timeout_s=options.step_timeout_s,
        spin_us=cores.spin_us,
        sim_step_ms=options.sim_step_ms,
    )


def _kv_budget_bytes(options: NodeOptions, device: str) -> int:
    if options.kv_cache_gib is not None:
        return int(options.kv_cache_gib * _GIB)
    if device == "sim":
        return 0
    share = psutil.virtual_memory().available * _KV_SHARE_OF_MEMORY / len(options.groups)
    return min(_DEFAULT_KV_BYTES, int(share))


def comm_bytes(engine: EngineConfig, model: ModelInfo) -> int:
    """Shared memory for the collectives of a group's ranks; 0 where it needs none."""
    if engine.tp == 1 or engine.device != "cpu":
        return 0
    return shared_bytes(
        engine.tp,
        engine.max_num_batched_tokens,
        model.hidden_size,
        engine.max_num_seqs,
        model.vocab_size,
    )
