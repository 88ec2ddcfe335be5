"""The parts of a step on the GPU: graphs capture them, other steps launch them.

    forward -> keep -> edit -> mask -> sample -> finish, as graphs.py says
    forward_mixed -> keep_edits -> sample_mixed, of any plan; only the first is captured

What is captured works on the buffers of SlotTables and takes nothing but sizes,
so that it fits every step of its size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ....ipc.plan import TAKE_FLAGS, PlanView
from ...sampling.cuda.edits import edit
from ...sampling.cuda.masks import MaskTables, mask
from .apply_plan import advance, apply
from .edit_state import keep_edits
from .gather import gather_decodes, gather_mixed
from .kinds import SamplingKind, SlotNeeds, StepNeeds
from .mixed_sizes import MixedSize
from .slot_tables import SlotTables

if TYPE_CHECKING:
    from ...kernels.interface import KVLayer
    from ...models.llama import Model
    from ...sampling.cuda.logprobs import Logprobs
    from ...sampling.cuda.sampler import CudaSampler


class StepParts:
    """One rank's; see graphs.DecodeStep for what steps of decodes alone are made of."""

    def __init__(
        self,
        model: Model,
        kv: list[KVLayer],
        tables: SlotTables,
        sampler: CudaSampler,
        logprobs: Logprobs,
        masks: MaskTables,
    ) -> None:
        self._model = model
        self._kv = kv
        self._tables = tables
        self._sampler = sampler
        self._logprobs = logprobs
        self._masks = masks

    def forward(self, rows: int, is_brief: bool = False) -> torch.Tensor:
        """The plan's effect, and the logits of a step of `rows` decodes and nothing else.

        is_brief: see Model.forward.
        """
        apply(self._tables)
        gather_decodes(self._tables, rows)
        batch = self._tables.batch(MixedSize(rows, 0, rows, rows))
        return self._model.forward(batch, self._kv, is_brief)

    def keep(self, logits: torch.Tensor, rows: int) -> None:
        """What finish() needs of the logits before they are edited."""
        self._logprobs.keep(logits, self._tables.sample_slots[:rows], self._tables.logprobs)

    def edit(self, logits: torch.Tensor, rows: int) -> None:
        """The requests' changes to their logits."""
        tables = self._tables
        edit(logits, tables.sample_slots[:rows], tables.draw_position[:rows], tables.edits)

    def mask(self, logits: torch.Tensor, rows: int) -> None:
        """The grammars' masks, which the host has prepared (grammar_rows.py)."""
        mask(logits[:rows], self._masks)

    def sample(self, logits: torch.Tensor, rows: int, kind: SamplingKind) -> None:
        """Tokens, and the slots moved past the step."""
        self._sample(logits, rows, rows, kind)

    def finish(self, rows: int) -> None:
        """The logprobs of the sampled tokens, into Logprobs.records."""
        tables = self._tables
        self._logprobs.finish(tables.sample_slots[:rows], tables.logprobs, tables.sampled[:rows])

    def apply(self) -> None:
        """The plan's effect on the slots, but for keep_edits()."""
        apply(self._tables)

    def forward_mixed(self, size: MixedSize, is_brief: bool = False) -> torch.Tensor:
        """The effect of a plan that feeds something, and its logits [size.logits, width].

        size: of the plan, or what it is padded to.  is_brief: see Model.forward.
        """
        apply(self._tables)
        gather_mixed(self._tables, size)
        return self._model.forward(self._tables.batch(size), self._kv, is_brief)

    def layers_of_each_kind(self, rows: int) -> None:
        """What layers launch in a step of so many rows, and the LM head where it may have as many.

        With no plan in the tables, all padding.
        """
        size = MixedSize(rows, 1, 0, 0)
        gather_mixed(self._tables, size)
        most = len(self._tables.sample_rows)  # those that sample, and those that are scored
        self._model.layers_of_each_kind(self._tables.batch(size), self._kv, rows <= most)

    def keep_edits(self, plan: PlanView, needs: SlotNeeds) -> None:
        """After apply(): what the plan's takes change in logits, and tokens that are counted.

        needs: the mirror's, the plan's takes included.
        """
        flagged = bool(plan.take[:, TAKE_FLAGS].any())
        counted = needs.counts(np.concatenate([plan.history[:, 0], plan.chunk[:, 0]]))
        if flagged or counted:
            keep_edits(self._tables, plan, flagged, counted)

    def sample_mixed(
        self, logits: torch.Tensor, size: MixedSize, sampled: int, scores: int, needs: StepNeeds
    ) -> None:
        """From the logits of forward_mixed() to tokens, logprobs and scores: as many as there are.

        The others of size.logits are padding.
        """
        if scores:
            scored = logits[sampled : sampled + scores]
            self._logprobs.score(scored, self._tables.score_tokens[:scores])
        logits = logits[:sampled]
        if needs.logprobs:
            self.keep(logits, sampled)
        if needs.edits:
            self.edit(logits, sampled)
        if needs.masks:
            self.mask(logits, sampled)
        self._sample(logits, size.chunks + size.decodes, sampled, needs.kind)
        if needs.logprobs:
            self.finish(sampled)

    def _sample(
        self, logits: torch.Tensor, sequences: int, sampled: int, kind: SamplingKind
    ) -> None:
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
