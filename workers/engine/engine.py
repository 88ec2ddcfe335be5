"""A step on a model: plan -> slot tables -> forward pass -> sampling -> result rows.

One Engine a worker process; the worker's loop (process.py) calls step().  It
owns what lives as long as the worker: the KV cache of this rank, the slot
tables and the sampler.  All ranks of a group make the same calls in the same
order, which is what their collectives rely on.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...ipc.config import EngineConfig
from ...ipc.plan import PlanView
from ..kernels.interface import Kernels
from ..sampling.sampler import Sampler
from .slots import SlotTable
from .step import StepResult
from .warm_up import warm_up_plans

if TYPE_CHECKING:
    from ..models.llama import Model
    from ..parallel.communicator import HostCommunicator


class Engine:
    """One rank of a group: `model` is that rank's; it is given the communicator here."""

    def __init__(
        self, model: Model, kernels: Kernels, engine: EngineConfig, communicator: HostCommunicator
    ) -> None:
        config = model.config
        model.communicator = communicator
        self._model = model
        self._engine = engine
        self._kv = [
            kernels.new_kv_layer(
                engine.num_blocks,
                engine.block_size,
                config.num_kv_heads // engine.tp,
                config.head_dim,
                getattr(torch, engine.dtype),
            )
            for _ in range(config.num_layers)
        ]
        self._slots = SlotTable(
            engine.max_num_seqs,
            -(-engine.max_model_len // engine.block_size),
            engine.max_num_batched_tokens,
            engine.block_size,
        )
        self._sampler = Sampler(config.vocab_size, engine.max_num_seqs, communicator)

    def warm_up(self) -> None:
        """A prefill and a decode of slot 0: kernels are made, memory is touched."""
        for plan in warm_up_plans(self._engine):
            self.step(plan, idle=True)

    @torch.inference_mode()
    def step(self, plan: PlanView, idle: bool) -> StepResult:
        """See StepEngine.  Raises ValueError for a plan that contradicts the slots' state."""
        batch = self._slots.apply(plan)
        if not len(batch.tokens):
            return StepResult(rows=self._slots.commit(np.empty(0, np.int32)), forward_us=0)
        start_ns = time.perf_counter_ns()
        logits = self._model.forward(batch, self._kv)
        forward_us = (time.perf_counter_ns() - start_ns) // 1000
        tokens = self._sampler.sample(logits, self._slots.rows, self._slots.params)
        return StepResult(rows=self._slots.commit(tokens), forward_us=forward_us)

    def finish(self) -> None:
        """Every step has returned its result."""
