"""From a worker's spec to its GPU engine: the device, the ranks, the weights, the memory.

Called once, in the worker's process, which is the first of the node to touch
CUDA.  A process sees the GPUs of its group and no others, numbered by rank.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ....ipc.actor import ALL_REDUCE_US, Actor
from ....ipc.config import ActorSpec
from ....ipc.plan import MAX_PLAN_SCORES
from ...kernels import create
from ...models.load import load_rank
from ...sampling.cuda.logprobs import Logprobs
from ...sampling.cuda.sampler import CudaSampler
from .engine import CudaEngine
from .flights import Deliver
from .gpu_clock import FlightRecorder
from .memory import MemoryAccount

if TYPE_CHECKING:
    from ...grammar.vocabulary import Vocabulary
    from ...models.config import ModelConfig
    from ...parallel.communicator import DeviceCommunicator

_SWITCH_INTERVAL_S = 0.0005


def create_engine(
    actor: Actor,
    fds: Mapping[str, int],
    config: ModelConfig,
    vocabulary: Vocabulary | None,
    deliver: Deliver,
    plan_memory: memoryview | None = None,
) -> CudaEngine:
    """Loads this rank's weights and makes its KV cache; the engine is still to be warmed up.

    deliver: gets every step's result, in a thread of the engine's own.
    plan_memory: see CudaEngine.
    Raises GpuMemoryError, and the errors of models/load.py.
    """
    spec, engine = actor.spec, actor.spec.engine
    # Launching a step with prefill keeps the interpreter busy for milliseconds; a result must not
    # wait that long for its turn.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    device = _take_device(spec)
    memory = MemoryAccount(device, actor.phase)
    dtype = getattr(torch, engine.dtype)
    kernels = create(
        "cuda", dtype, engine.batch_invariant, engine.e4m7_weights, engine.kv_cache_dtype
    )
    with memory.taking("the weights"):
        model = load_rank(
            engine.model_path, config, dtype, engine.load_format, engine.tp, spec.rank,
            kernels, actor.phase, spec.loading_threads,
        )  # fmt: skip
        torch.cuda.empty_cache()
    with memory.taking("collectives"):
        communicator = _create_communicator(actor, fds, device, config.hidden_size)
    model.communicator = communicator
    shard = config.vocab_size // engine.tp
    with memory.taking("sampling"):
        sampler = CudaSampler(
            engine.max_num_seqs, config.vocab_size, spec.rank * shard, communicator, device,
            engine.sampling_mode,
        )  # fmt: skip
        logprobs = Logprobs(
            engine.max_num_seqs, MAX_PLAN_SCORES, shard, spec.rank * shard, communicator, device
        )
    return CudaEngine(
        model, kernels, engine, sampler, logprobs, deliver, actor.fatal, memory,
        FlightRecorder(fds), vocabulary, plan_memory,
    )  # fmt: skip


def _take_device(spec: ActorSpec) -> torch.device:
    """Makes the rank's GPU, and a stream of its own, current in this thread."""
    if spec.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(spec.gpus)
    device = torch.device("cuda", max(spec.rank, 0))
    torch.cuda.set_device(device)
    torch.cuda.set_stream(torch.cuda.Stream(device))
    return device


def _create_communicator(
    actor: Actor, fds: Mapping[str, int], device: torch.device, width: int
) -> DeviceCommunicator:
    from ...parallel.communicator import SingleRank

    if actor.spec.engine.tp == 1:
        return SingleRank()
    from ...parallel.cuda import create_communicator

    communicator = create_communicator(actor.spec, fds, device, width)
    actor.detail[ALL_REDUCE_US] = {str(nbytes): us for nbytes, us in communicator.sums_us.items()}
    return communicator
