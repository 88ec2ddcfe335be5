"""From the options, the model and the machine to what a group runs with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import psutil

from albireo.ipc.config import LOOKAHEAD, EngineConfig, ModelInfo, blocks_for
from albireo.workers.engine.cuda.mixed_sizes import rows_beside_decodes
from albireo.workers.parallel.slabs import shared_bytes

from .core_plan import CorePlan
from .e4m7 import decide
from .gpu_memory import GpuMemory, estimate
from .gpus import Gpu
from .kv_cache import choose_kv_cache, with_e4m7_cache
from .options import NodeOptions, OptionError

_GIB = 1 << 30
_DEFAULT_KV_BYTES = 4 * _GIB
_KV_SHARE_OF_MEMORY = 0.25
_ROWS_FILL_GPU = 512
"""Beyond, a step's time grows with its rows; below, reading the weights takes much of it."""


def size_engine(
    options: NodeOptions, model_path: str, device: str, dtype: str, model: ModelInfo, tp: int,
    cores: CorePlan, gpus: Sequence[Gpu] = (),
) -> EngineConfig:  # fmt: skip
    """Decides everything the actors of one group agree on; gpus: of its ranks, on `cuda`.

    options: checked.  Raises OptionError, with the arithmetic, when the KV cache cannot
    hold one request of the longest length.
    """
    max_model_len = options.max_model_len or model.context_len
    if max_model_len > model.context_len:
        raise OptionError(
            f"--max-model-len {max_model_len} exceeds the model's context of {model.context_len}"
        )
    batched = _batched_tokens(options, device)
    kv_cache_dtype = choose_kv_cache(options, device, dtype, model, gpus)
    if kv_cache_dtype == "e4m7":
        model = with_e4m7_cache(model)
    e4m7 = decide(options, device, dtype, model, tp, max_model_len, batched, gpus)
    num_blocks = _num_blocks(options, device, model, tp, max_model_len, batched, gpus, e4m7)
    return EngineConfig(
        model_path=model_path,
        device=device,
        dtype=dtype,
        load_format=options.load_format,
        tp=tp,
        max_model_len=max_model_len,
        block_size=options.block_size,
        num_blocks=num_blocks,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=batched,
        lookahead=LOOKAHEAD if options.async_scheduling else 0,
        batch_invariant=options.batch_invariant,
        step_timeout_s=options.step_timeout_s,
        spin_us=cores.spin_us,
        sim_step_ms=options.sim_step_ms,
        cuda_graphs=options.cuda_graphs,
        sampling_mode=options.sampling_mode,
        async_output=options.async_output,
        prefix_caching=options.enable_prefix_caching,
        e4m7_weights=e4m7,
        kv_cache_dtype=kv_cache_dtype,
        num_swap_blocks=_num_swap_blocks(options, model),
        itl_target_ms=options.itl_target_ms,
        mixed_step_tokens=_mixed_step_tokens(options, device, model, tp, batched),
        gpu_memory_utilization=_utilization(options, device),
    )


def _utilization(options: NodeOptions, device: str) -> float:
    """Of EngineConfig: a KV cache on a GPU that nobody has given a size is sized there."""
    sized = device != "cuda" or options.kv_cache_gib is not None
    return 0.0 if sized else options.gpu_memory_utilization


def _batched_tokens(options: NodeOptions, device: str) -> int:
    default = 512 if device == "cpu" else 2048
    return options.max_num_batched_tokens or max(default, options.max_num_seqs)


def _mixed_step_tokens(
    options: NodeOptions, device: str, model: ModelInfo, tp: int, batched: int
) -> int:
    """On a GPU what fills it, whatever the model's size, or more of a small one."""
    if options.mixed_step_tokens is not None:
        return options.mixed_step_tokens
    if device != "cuda":
        return 0
    return min(batched, max(_ROWS_FILL_GPU, rows_beside_decodes(model.layer_products, tp)))


def _num_swap_blocks(options: NodeOptions, model: ModelInfo) -> int:
    """Blocks of a group's host memory; each rank has its part of every one."""
    blocks = int(options.swap_space_gib * _GIB) // (model.kv_bytes_per_token * options.block_size)
    available = psutil.virtual_memory().available
    if options.swap_space_gib * _GIB * len(options.groups) > available:
        raise OptionError(
            f"--swap-space {options.swap_space_gib:g} GiB for each of {len(options.groups)} groups "
            f"exceeds the {available / _GIB:.2f} GiB of memory that are available"
        )
    if options.swap_space_gib and not blocks:
        raise OptionError(
            f"--swap-space {options.swap_space_gib:g} GiB holds no KV block of "
            f"{model.kv_bytes_per_token * options.block_size / 1024:.0f} KiB: raise it, or leave "
            "it out, and preempted requests are computed again"
        )
    return blocks


def _num_blocks(
    options: NodeOptions, device: str, model: ModelInfo, tp: int, max_model_len: int, batched: int,
    gpus: Sequence[Gpu], e4m7: str,
) -> int:  # fmt: skip
    """As many as all slots could fill, or as the budget holds: on a GPU, the largest it can be."""
    block_bytes = model.kv_room_per_token * options.block_size
    needed = blocks_for(max_model_len, options.block_size)
    useful = options.max_num_seqs * needed
    if device == "sim":
        return useful
    memory = None
    if gpus:
        memory = estimate(
            model, tp, options.max_num_seqs, batched, options.gpu_memory_utilization,
            options.cuda_graphs, gpus, e4m7,
        )  # fmt: skip
    asked_gib = options.kv_cache_gib
    if asked_gib is not None:
        budget = int(asked_gib * _GIB)
    elif memory is not None:
        budget = memory.most_kv_bytes * tp
    else:
        share = psutil.virtual_memory().available * _KV_SHARE_OF_MEMORY / len(options.groups)
        budget = min(_DEFAULT_KV_BYTES, int(share))
    num_blocks = min(useful, budget // block_bytes)
    if num_blocks >= needed:
        if asked_gib is not None and memory is not None:
            _check_room(asked_gib, num_blocks * block_bytes // tp, memory)
        return num_blocks
    room = num_blocks * options.block_size
    if asked_gib is None and memory is not None:
        shorter = f"lower --max-model-len to {room}, " if room else ""
        raise OptionError(
            f"{memory.describe()}, {num_blocks} blocks of {options.block_size} tokens "
            f"({block_bytes / tp / 1024:.0f} KiB each), but one request of {max_model_len} tokens "
            f"needs {needed}: {shorter}raise --gpu-memory-utilization, or spread the model "
            "over more GPUs with --groups"
        )
    shorter = f" or lower --max-model-len to {room}" if room else ""
    enough = math.ceil(needed * block_bytes / _GIB * 100) / 100
    raise OptionError(
        f"the KV cache of a group, {budget / _GIB:.2f} GiB, holds {num_blocks} blocks of "
        f"{options.block_size} tokens ({block_bytes / 1024:.0f} KiB each), but one request of "
        f"{max_model_len} tokens needs {needed}: raise --kv-cache-gib to "
        f"{enough:.2f}{shorter}"
    )


def _check_room(asked_gib: float, nbytes: int, memory: GpuMemory) -> None:
    """Of a KV cache that was asked for, a rank's part of nbytes: the GPU must have it beside the
    weights.  That steps fit, too, the worker finds out."""
    if nbytes > memory.free - memory.weights:
        raise OptionError(
            f"--kv-cache-gib {asked_gib:g} takes {nbytes / _GIB:.2f} GiB of each GPU, "
            f"but {memory.gpu} has {memory.free / _GIB:.2f} GiB free, of which the weights take "
            f"{memory.weights / _GIB:.2f}: lower it, or leave it out and the cache gets what is "
            "left; --groups spreads a model over more GPUs"
        )


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
