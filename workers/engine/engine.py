"""A step on a model: plan -> slot tables -> forward pass -> sampling -> result rows.

One Engine a worker process; the worker's loop (process.py) calls step().  It
owns what lives as long as the worker: the KV cache of this rank, the slot
tables, what requests edit in their logits, and the sampler.  All ranks of a
group make the same calls in the same order, which is what their collectives
rely on.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...ipc.config import EngineConfig
from ...ipc.plan import MAX_TOP_LOGPROBS, NOTHING, TAKE_COUNTS, Int32Array, PlanView
from ..grammar.matchers import GrammarRows, SlotGrammars
from ..kernels.interface import Kernels, KVLayer
from ..sampling.edits import SlotEdits
from ..sampling.logprobs import Logprobs
from ..sampling.masks import mask_rows
from ..sampling.sampler import Sampler
from .block_copies import BlockCopies
from .slots import SlotTable
from .step import StepResult, StepTimes, WarmedUp
from .warm_up import warm_up_plans

if TYPE_CHECKING:
    from ..grammar.vocabulary import Vocabulary
    from ..models.llama import Model
    from ..parallel.communicator import HostCommunicator

_NO_ROWS = np.empty(0, np.int64)


class Engine:
    """One rank of a group: `model` is that rank's; it is given the communicator here.

    vocabulary: what grammars are made with; without it no request may have one.
    """

    def __init__(
        self,
        model: Model,
        kernels: Kernels,
        engine: EngineConfig,
        communicator: HostCommunicator,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        config = model.config
        model.communicator = communicator
        self._model = model
        self._engine = engine
        self._kernels = kernels
        self._kv = self._new_cache(engine.num_blocks)
        self._copies = BlockCopies(
            self._kv, self._new_cache(engine.num_swap_blocks) if engine.num_swap_blocks else []
        )
        self._slots = SlotTable(
            engine.num_slots,
            engine.blocks_of_longest,
            engine.max_num_batched_tokens,
            engine.block_size,
        )
        width = config.vocab_size // communicator.size
        self._edits = SlotEdits(engine.num_slots, width, communicator.rank * width)
        self._first_token = communicator.rank * width
        self._grammars = SlotGrammars(vocabulary, engine.num_slots, 1, engine.step_timeout_s)
        self._masks = np.zeros((engine.max_num_seqs, -(-config.vocab_size // 32)), np.int32)
        self._wants_logprobs = False
        self._logprobs = Logprobs(config.vocab_size, engine.max_num_seqs, communicator)
        self._sampler = Sampler(
            config.vocab_size, engine.max_num_seqs, communicator, engine.sampling_mode
        )

    @torch.inference_mode()
    def warm_up(self) -> WarmedUp:
        """A prefill and a decode of slot 0: kernels are made, memory is touched.

        See StepEngine.
        """
        for plan in warm_up_plans(self._engine):
            self.step(plan, idle=True)
        self._sampler.tune()
        return WarmedUp(self._copies.measure_ns())

    @torch.inference_mode()
    def step(self, plan: PlanView, idle: bool) -> StepResult:
        """See StepEngine.  Raises ValueError for a plan that contradicts the slots' state."""
        if len(plan.copy):
            self._copies.apply(plan.copy)
        batch = self._slots.apply(plan)
        self._edits.apply_plan(plan)
        self._grammars.apply_plan(plan)
        if len(plan.take):
            self._wants_logprobs = bool(self._slots.state.logprobs.any())
        if not len(batch.tokens):
            return StepResult(rows=self._slots.commit(np.empty(0, np.int32)), forward_us=0)
        begun_ns = time.monotonic_ns()
        grammars = self._begin_masks()
        logits = self._model.forward(batch, self._kv)
        forwarded_ns = time.monotonic_ns()
        tokens, logprobs = self._sample(logits, plan, grammars)
        times = StepTimes(begun_ns, begun_ns, forwarded_ns, time.monotonic_ns())
        forward_us = (forwarded_ns - begun_ns) // 1000
        return StepResult(
            rows=self._slots.commit(tokens), forward_us=forward_us, times=times, logprobs=logprobs
        )

    def plans_in_use(self) -> int:
        """A plan has been read when step() returns."""
        return 0

    def finish(self) -> None:
        """Every step has returned its result."""

    def _new_cache(self, num_blocks: int) -> list[KVLayer]:
        config, engine = self._model.config, self._engine
        return [
            self._kernels.new_kv_layer(
                num_blocks,
                engine.block_size,
                config.num_kv_heads // engine.tp,
                config.head_dim,
                getattr(torch, engine.dtype),
            )
            for _ in range(config.num_layers)
        ]

    def _begin_masks(self) -> GrammarRows | None:
        slots = self._slots.rows.slots
        rows = self._grammars.rows_of(slots)
        return self._grammars.begin(rows, slots, self._masks) if len(rows) else None

    def _sample(
        self, logits: torch.Tensor, plan: PlanView, grammars: GrammarRows | None
    ) -> tuple[Int32Array, Int32Array]:
        """The tokens of the sampling rows, and the records of the logprobs that are wanted.

        logits: of the sampling rows, then of the rows that are scored.
        """
        rows = self._slots.rows
        sampled = logits[: len(rows)]
        parts: list[Int32Array] = []
        wanted = _NO_ROWS
        if self._wants_logprobs:
            best = self._slots.state.logprobs[rows.slots]
            wanted = np.flatnonzero(best)
            # From before the edits, which are made in place.
            raw = sampled[torch.from_numpy(wanted)]
        asked = self._edits.asked(rows)
        if asked:
            self._edits.apply(sampled.numpy(), rows)
        if grammars is not None:
            self._mask(sampled, grammars)
        tokens = self._sampler.sample(sampled, rows, self._slots.params)
        if grammars is not None:
            grammars.accept(tokens)
        if asked & TAKE_COUNTS:
            self._edits.count(rows, tokens)
        if len(wanted):
            records = self._logprobs.describe(raw, np.maximum(tokens[wanted], 0), best[wanted] - 1)
            records[:, 0] = rows.requests[wanted]
            records[:, 1] = rows.positions[wanted]
            parts.append(records[tokens[wanted] >= 0])
        if len(plan.score):
            parts.append(self._score(logits, plan))
        return tokens, np.concatenate(parts) if parts else NOTHING

    def _mask(self, logits: torch.Tensor, grammars: GrammarRows) -> None:
        self._grammars.finish(grammars)
        masked = grammars.outcome == 0
        mask_rows(logits.numpy(), grammars.rows, grammars.masks, masked, self._first_token)

    def _score(self, logits: torch.Tensor, plan: PlanView) -> Int32Array:
        """The records of the prompt positions that the plan scores, with as many best as fit."""
        scores = self._slots.scores(plan)
        best = np.full(len(scores), MAX_TOP_LOGPROBS, np.int32)
        records = self._logprobs.describe(logits[-len(scores) :], scores.tokens, best)
        records[:, 0] = scores.requests
        records[:, 1] = scores.positions
        return records
