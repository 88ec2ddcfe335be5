"""A step on the GPU: everything is launched, nothing is waited for.

One CudaEngine a worker process.  The worker's loop calls step() with each plan
and has the plan's frame back once it is copied; up to as many steps as there are
flights are queued in one stream:

    copy of the plan's words    from the ring's own memory (plan_memory.py)
    copies of KV blocks         where the plan has any
    apply, gather, forward      one CUDA graph, of a decode step or a mixed one (mixed_sizes.py)
    sample, advance             behind a wait for masks where rows have grammars (grammar_rows.py);
                                a decode step: a second graph, with more of them around it where
                                rows change their logits or ask for logprobs (graphs.py); a mixed
                                step: launched one by one, while the GPU has the forward pass to do
    copy of the tokens          into pinned memory, then the event that the collector waits for;
                                in a stream of its own, so that the next step begins meanwhile

The next step reads slots and KV cache as this one leaves them, by the stream's
order; before it samples it waits for the copy, which has long been made.  The CPU
keeps a mirror of the slots (slot_state.py) that knows requests and positions, not
tokens: enough for shapes, for the choice of the graphs (kinds.py) and for the names
in the result rows.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING

import torch
from msgspec.structs import replace

from ....ipc.config import EngineConfig
from ....ipc.garbage import collector_paused
from ....ipc.plan import PlanView
from ...kernels.interface import Kernels
from ...parallel.graph_time import graph_us
from ...sampling.cuda.masks import MaskTables
from ..slot_state import SlotState
from ..step import WarmedUp
from .block_copies import BlockCopies
from .flights import Collector, Deliver, Fail, Flight
from .gpu_clock import FlightRecorder
from .grammar_rows import StepMasks
from .graphs import DecodeGraphs
from .kinds import SlotNeeds, StepNeeds
from .kv_cache import KvCache
from .memory import MemoryAccount
from .mixed_graphs import MixedGraphs
from .mixed_sizes import captured_mixed_sizes, loaded_rows, most_rows, size_of
from .plan_memory import PlanMemory
from .profile_plans import profile_plans
from .slot_tables import SlotTables
from .step_parts import StepParts
from .stream_copies import StreamCopies

if TYPE_CHECKING:
    from ...grammar.vocabulary import Vocabulary
    from ...models.llama import Model
    from ...sampling.cuda.logprobs import Logprobs
    from ...sampling.cuda.sampler import CudaSampler


class CudaEngine:
    """One rank of a group; model, sampler and logprobs have their communicators.

    The calling thread's current stream is the engine's from now on; it must be
    no default stream.  deliver, fail: see flights.py.  recorder: of the worker's
    timeline.  vocabulary: what grammars are made with; without it no request may have one.
    plan_memory: the ring's, where plans come from one; they are read there, by the GPU too.
    """

    def __init__(
        self,
        model: Model,
        kernels: Kernels,
        engine: EngineConfig,
        sampler: CudaSampler,
        logprobs: Logprobs,
        deliver: Deliver,
        fail: Fail,
        memory: MemoryAccount,
        recorder: FlightRecorder | None = None,
        vocabulary: Vocabulary | None = None,
        plan_memory: memoryview | None = None,
    ) -> None:
        config = model.config
        device = kernels.device
        self._engine = engine
        self._config = config
        self._sampler = sampler
        self._logprobs = logprobs
        self._memory = memory
        self._stream = torch.cuda.current_stream()
        self._kv = kv = KvCache(config, kernels, engine, memory)
        self._copies = BlockCopies(kv.layers, engine.num_swap_blocks)
        width = config.vocab_size // engine.tp
        with memory.taking(f"the state of {engine.max_num_seqs} sequences"):
            self._tables = SlotTables(
                engine.num_slots,
                engine.max_num_seqs,
                engine.blocks_of_longest,
                engine.max_num_batched_tokens,
                engine.block_size,
                width,
                model.rank * width,
                device,
            )
            self._tables.pad_into(kv.scratch_block)
            mask_tables = MaskTables(
                engine.max_num_seqs, config.vocab_size, model.rank * width, device
            )
        self._masks = StepMasks(vocabulary, engine.num_slots, mask_tables, engine.step_timeout_s)
        self._parts = StepParts(model, kv.layers, self._tables, sampler, logprobs, mask_tables)
        self._outgoing = torch.cuda.Stream()
        self._copy_in, self._copy_out = StreamCopies(self._stream), StreamCopies(self._outgoing)
        self._landed = torch.cuda.Event()  # the last step's `done`
        self._landed.record(self._outgoing)
        self._words_address = self._tables.words.data_ptr()
        self._sampled_address = self._tables.sampled.data_ptr()
        self._mirror = SlotState(engine.num_slots)
        self._needs = SlotNeeds(engine.num_slots)
        self._rows, self._rows_need = self._mirror.rows, self._needs.of(self._mirror.rows.slots)
        self._graphs: DecodeGraphs | None = None
        self._mixed: MixedGraphs | None = None
        flights = [
            Flight(len(self._tables.words), engine.max_num_seqs, engine.spin_us > 0)
            for _ in range(2 * (engine.lookahead + 1))
        ]
        self._ring = PlanMemory.register(plan_memory, device) if plan_memory else None
        self._copying: deque[Flight] = deque()
        self._collector = Collector(
            flights, deliver, fail, engine.step_timeout_s, recorder or FlightRecorder({})
        )

    @torch.inference_mode()
    def warm_up(self) -> WarmedUp:
        """The times of sampling modes, the worst steps, kernels of all sizes, the graphs; what they
        leave is the KV cache's.

        See StepEngine.  Raises GpuMemoryError.
        """
        engine = self._engine
        # First: a graph to measure by gives back what PyTorch has kept, and what the worst steps
        # took is to stay.
        with self._memory.taking("sampling modes"):
            times = self._sampler.tune(lambda work: graph_us(work, self._stream.device))
        for case, by_mode in times.items():
            logging.info("us of sampling modes, %s: %s", case, by_mode)
        with self._memory.taking(f"steps of {engine.max_num_batched_tokens} tokens"):
            for plan in profile_plans(replace(engine, num_blocks=self._kv.num_blocks)):
                flight = self._collector.take()
                self._launch(plan, flight)
                flight.done.synchronize()
                self._collector.give_back(flight)
        # No plan of these has a grammar: it would have to be one of this model's.
        self._parts.mask(
            torch.zeros(1, self._tables.edits.width, device=self._tables.words.device), 1
        )
        # An empty plan: what runs from here on is padding, and `apply` changes no slot.
        self._tables.words.zero_()
        with self._memory.taking("kernels of all sizes of steps"):
            self._load_kernels()
        if engine.cuda_graphs:
            self._capture()
        self._kv.fill()
        self._tables.pad_into(self._kv.scratch_block)
        swap_block_ns = self._copies.measure_ns(self._kv.num_blocks)
        torch.cuda.synchronize()
        logging.info("GPU memory: %s", self._memory.describe())
        return WarmedUp(swap_block_ns, self._kv.num_blocks)

    def _load_kernels(self) -> None:
        """Has layers' kernels loaded, or compiled, so that no request's step waits for that."""
        begun_s = time.monotonic()
        sizes = loaded_rows(self._engine.max_num_batched_tokens)
        for rows in sizes:
            self._parts.layers_of_each_kind(rows)
        torch.cuda.synchronize()
        logging.info("kernels of %d sizes in %.1f s", len(sizes), time.monotonic() - begun_s)

    def _capture(self) -> None:
        """The largest first: the others fit into the memory that they took."""
        engine = self._engine
        begun_s = time.monotonic()
        sizes = captured_mixed_sizes(
            most_rows(
                self._config.layer_products(), engine.tp, engine.max_num_batched_tokens,
                self._config.hidden_size * getattr(torch, engine.dtype).itemsize,
            ),
            engine.max_num_seqs,
        )  # fmt: skip
        # A tensor that is freed meanwhile would break the capture.
        with self._memory.taking("CUDA graphs"), collector_paused():
            pool = torch.cuda.graph_pool_handle()
            self._mixed = MixedGraphs(sizes, self._parts.forward_mixed, pool)
            mixed_s = time.monotonic() - begun_s
            self._graphs = DecodeGraphs(engine.max_num_seqs, self._parts, pool)
        logging.info(
            "CUDA graphs: %d of mixed steps of up to %d tokens in %.1f s, %d of decode steps in "
            "%.1f s", len(sizes), sizes[-1].rows, mixed_s, self._graphs.count,
            time.monotonic() - begun_s - mixed_s,
        )  # fmt: skip

    @torch.inference_mode()
    def step(self, plan: PlanView, idle: bool) -> None:
        """See StepEngine.  Launches; the result is delivered later.

        Raises ValueError for a plan that contradicts the slots' state.
        """
        flight = self._collector.take()
        self._launch(plan, flight)
        self._collector.send(flight)

    def plans_in_use(self) -> int:
        """See StepEngine: those whose copy to the GPU is not done."""
        while self._copying and self._copying[0].begun.query():
            self._copying.popleft()
        return len(self._copying)

    def finish(self) -> None:
        """Returns when all results are delivered."""
        self._collector.finish()
        if self._ring:
            self._ring.close()
            self._ring = None

    def _launch(self, plan: PlanView, flight: Flight) -> None:
        mirror, tables = self._mirror, self._tables
        mirror.take(plan.take)
        if len(plan.take):
            self._needs.take(plan.take, mirror.params)
        mirror.advance(plan)
        self._masks.apply_plan(plan)
        rows = mirror.rows
        if rows is not self._rows:
            self._rows, self._rows_need = rows, self._needs.of(rows.slots)
        needs = self._rows_need
        flight.begin(plan.step, rows.requests)
        self._copy_plan(plan, flight)
        copies_end = len(plan.copy) and self._copies.begin(plan, tables.words)
        if self._graphs and len(plan.decode) and not len(plan.chunk) and not len(plan.take):
            size = self._graphs.padded(len(plan.decode))
            self._graphs.forward(size)
            self._forwarded(flight)
            if needs.masks:
                self._masks.prepare(rows.slots, flight)
            self._graphs.sample(size, needs)
        else:
            self._launch_mixed(plan, len(rows), needs, flight)
        if copies_end:
            self._copies.end()
        flight.sampled.record(self._stream)
        self._outgoing.wait_event(flight.sampled)
        if len(rows):
            self._copy_out.to_host(flight.ids_address, self._sampled_address, 4 * len(rows))
        if needs.logprobs or len(plan.score):
            with torch.cuda.stream(self._outgoing):
                self._report_logprobs(plan, needs, flight)
        flight.done.record(self._outgoing)
        self._landed = flight.done

    def _forwarded(self, flight: Flight) -> None:
        """From here on what the last step has sampled may be overwritten."""
        flight.forwarded.record(self._stream)
        self._stream.wait_event(self._landed)

    def _copy_plan(self, plan: PlanView, flight: Flight) -> None:
        """The plan's words on their way to the device, and the step's first event."""
        address: int = plan.words.__array_interface__["data"][0]
        nbytes = plan.words.nbytes
        if self._ring and self._ring.holds(address, nbytes):
            self._copying.append(flight)
        else:
            address = flight.stage(plan.words)
        self._copy_in.to_device(self._words_address, address, nbytes)
        flight.launched_ns = time.monotonic_ns()
        flight.begun.record(self._stream)

    def _report_logprobs(self, plan: PlanView, needs: StepNeeds, flight: Flight) -> None:
        """What the GPU has found goes to pinned memory; whose it is, the flight is told."""
        rows, scores = self._mirror.rows, len(plan.score)
        if needs.logprobs:
            asking = self._needs.asking(rows.slots)
            flight.expect_logprobs(asking, rows.positions[asking])
            records = self._logprobs.records[: len(rows)]
            flight.records[: len(rows)].copy_(records, non_blocking=True)
        if scores:
            scored = self._mirror.scores(plan)
            flight.expect_scores(scored.requests, scored.positions)
            records = self._logprobs.score_records[:scores]
            flight.score_records[:scores].copy_(records, non_blocking=True)

    def _launch_mixed(self, plan: PlanView, sampled: int, needs: StepNeeds, flight: Flight) -> None:
        """A step with prefill chunks or takes, or any where there are no graphs."""
        parts = self._parts
        if not len(plan.chunk) and not len(plan.decode):
            parts.apply()
            parts.keep_edits(plan, self._needs)
            self._forwarded(flight)
            return
        size = size_of(plan, sampled)
        if self._mixed and (padded := self._mixed.padded(size)):
            size = padded
            logits = self._mixed.forward(size)
        else:
            logits = parts.forward_mixed(size)
        self._forwarded(flight)
        parts.keep_edits(plan, self._needs)
        if needs.masks:
            self._masks.prepare(self._mirror.rows.slots, flight)
        parts.sample_mixed(logits, size, sampled, len(plan.score), needs)
