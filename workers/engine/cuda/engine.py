"""A step on the GPU: everything is launched, nothing is waited for.

One CudaEngine a worker process.  The worker's loop calls step() with each plan
and has the plan's frame back at once; up to as many steps as there are flights
are queued in one stream:

    copy of the plan's words    from pinned memory
    apply, gather, forward      a decode step: one CUDA graph; with prefill: launched one by one
    sample, advance             a decode step: a second graph
    copy of the tokens          into pinned memory, then the event that the collector waits for

The next step reads slots and KV cache as this one leaves them, by the stream's
order.  The CPU keeps a mirror of the slots (slot_state.py) that knows requests
and positions, not tokens: enough for shapes, for the choice of the sampling
graph and for the names in the result rows.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch

from ....ipc.config import EngineConfig
from ....ipc.plan import TAKE_SLOT, PlanView
from ...kernels.interface import Kernels
from ..slot_state import SlotState
from .apply_plan import advance, apply, gather_chunks, gather_decodes
from .flights import Collector, Deliver, Fail, Flight
from .graphs import DecodeGraphs
from .kinds import SamplingKind, kinds
from .memory import MemoryAccount
from .profile_plans import profile_plans
from .slot_tables import SlotTables

if TYPE_CHECKING:
    from ...models.llama import Model
    from ...sampling.cuda.sampler import CudaSampler


class CudaEngine:
    """One rank of a group; `model` and `sampler` have their communicators.

    The calling thread's current stream is the engine's from now on; it must be
    no default stream.  deliver, fail: see flights.py.
    """

    def __init__(
        self,
        model: Model,
        kernels: Kernels,
        engine: EngineConfig,
        sampler: CudaSampler,
        deliver: Deliver,
        fail: Fail,
        memory: MemoryAccount,
    ) -> None:
        config = model.config
        device = kernels.device
        self._model = model
        self._engine = engine
        self._sampler = sampler
        self._memory = memory
        self._stream = torch.cuda.current_stream()
        # One block more than the scheduler knows: padding writes there.
        with memory.taking(f"a KV cache of {engine.num_blocks} blocks"):
            self._kv = [
                kernels.new_kv_layer(
                    engine.num_blocks + 1,
                    engine.block_size,
                    config.num_kv_heads // engine.tp,
                    config.head_dim,
                    getattr(torch, engine.dtype),
                )
                for _ in range(config.num_layers)
            ]
        self._tables = SlotTables(
            engine.max_num_seqs,
            -(-engine.max_model_len // engine.block_size),
            engine.max_num_batched_tokens,
            engine.block_size,
            engine.num_blocks,
            device,
        )
        self._mirror = SlotState(engine.max_num_seqs)
        self._kinds = np.zeros(engine.max_num_seqs, np.int8)
        self._graphs: DecodeGraphs | None = None
        flights = [
            Flight(len(self._tables.words), engine.max_num_seqs)
            for _ in range(2 * (engine.lookahead + 1))
        ]
        self._collector = Collector(flights, deliver, fail, engine.step_timeout_s)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """The worst steps there can be, then the graphs.  Raises GpuMemoryError."""
        engine = self._engine
        with self._memory.taking(f"steps of {engine.max_num_batched_tokens} tokens"):
            for plan in profile_plans(engine):
                flight = self._collector.take()
                self._launch(plan, flight)
                flight.done.synchronize()
                self._collector.give_back(flight)
        if engine.cuda_graphs:
            # An empty plan: `apply` inside the graphs changes no slot while they are made.
            self._tables.words.zero_()
            with self._memory.taking("CUDA graphs"):
                self._graphs = DecodeGraphs(
                    engine.max_num_seqs, self._forward_decodes, self._sample_decodes
                )
        torch.cuda.synchronize()
        logging.info("GPU memory: %s", self._memory.describe())

    @torch.inference_mode()
    def step(self, plan: PlanView, idle: bool) -> None:
        """See StepEngine.  Launches; the result is delivered later.

        Raises ValueError for a plan that contradicts the slots' state.
        """
        flight = self._collector.take()
        self._launch(plan, flight)
        self._collector.send(flight)

    def finish(self) -> None:
        """Returns when all results are delivered."""
        self._collector.finish()

    def _launch(self, plan: PlanView, flight: Flight) -> None:
        mirror, tables = self._mirror, self._tables
        mirror.take(plan.take)
        if len(plan.take):
            slots = plan.take[:, TAKE_SLOT]
            self._kinds[slots] = kinds(mirror.params, slots)
        mirror.advance(plan)
        rows = mirror.rows
        words = flight.stage(plan.step, plan.words, rows.requests)
        tables.words[: len(words)].copy_(words, non_blocking=True)
        kind = SamplingKind(int(self._kinds[rows.slots].max(initial=0)))
        flight.begun.record(self._stream)
        if self._graphs is not None and len(plan.decode) and not len(plan.chunk):
            size = self._graphs.padded(len(plan.decode))
            self._graphs.forward(size)
            flight.forwarded.record(self._stream)
            self._graphs.sample(size, kind)
        else:
            self._launch_eagerly(plan, len(rows), kind, flight)
        if len(rows):
            flight.ids[: len(rows)].copy_(tables.sampled[: len(rows)], non_blocking=True)
        flight.done.record(self._stream)

    def _launch_eagerly(
        self, plan: PlanView, sampled: int, kind: SamplingKind, flight: Flight
    ) -> None:
        """A step with prefill chunks, or any where there are no graphs."""
        tables = self._tables
        chunks, decodes, chunk_rows = len(plan.chunk), len(plan.decode), len(plan.chunk_token)
        sequences = chunks + decodes
        apply(tables)
        if not sequences:
            flight.forwarded.record(self._stream)
            return
        if chunks:
            gather_chunks(tables, chunks)
        if decodes:
            gather_decodes(tables, decodes, chunk_rows, chunks, sampled - decodes)
        batch = tables.batch(chunk_rows + decodes, sequences, sampled, chunks)
        logits = self._model.forward(batch, self._kv)
        flight.forwarded.record(self._stream)
        self._sample(logits, sequences, sampled, kind)

    def _forward_decodes(self, count: int) -> torch.Tensor:
        """The plan's effect, and the logits of a step of `count` decodes and nothing else."""
        apply(self._tables)
        gather_decodes(self._tables, count)
        return self._model.forward(self._tables.batch(count, count, count, 0), self._kv)

    def _sample_decodes(self, logits: torch.Tensor, count: int, kind: SamplingKind) -> None:
        self._sample(logits, count, count, kind)

    def _sample(
        self, logits: torch.Tensor, sequences: int, sampled: int, kind: SamplingKind
    ) -> None:
        """Tokens of the sampling rows, and the slots moved past the step."""
        tables = self._tables
        if sampled:
            self._sampler.sample(
                logits,
                tables.sample_slots[:sampled],
                tables,
                tables.draw_position[:sampled],
                kind is not SamplingKind.GREEDY,
                tables.sampled[:sampled],
                kind is SamplingKind.FILTERED,
            )
        advance(tables, sequences, sampled)
