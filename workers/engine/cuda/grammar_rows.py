"""Grammar masks of a step on the GPU: made while its forward pass runs, there before it samples.

A grammar's mask needs the token of the step before.  So a step with such rows, and no other, has a
wait of the host in its middle:

    launch the forward pass         the GPU works, on this step or still on the one before
    wait for the step before        its tokens move the matchers
    masks by threads, copied        the forward pass of this step runs meanwhile
    launch the sampling

The collector's thread takes a step's tokens as well: who comes first gives them to the grammars.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....ipc.plan import Int32Array, PlanView
from ...grammar.matchers import GrammarRows, SlotGrammars
from ...sampling.cuda.masks import MaskTables
from .flights import Flight
from .pinned import staging_words

if TYPE_CHECKING:
    from ...grammar.vocabulary import Vocabulary

_THREADS = 4


class StepMasks:
    """Of one rank; tables: on the device, copied to from pinned memory of this one's."""

    def __init__(
        self, vocabulary: Vocabulary | None, slots: int, tables: MaskTables, timeout_s: float
    ) -> None:
        self._grammars = SlotGrammars(vocabulary, slots, _THREADS, timeout_s)
        self._tables = tables
        rows, words = tables.masks.shape
        self._masks = staging_words((1 if vocabulary is None else rows) * words).view(-1, words)
        self._mask_of_row = staging_words(rows)
        self._masks_array: Int32Array = self._masks.numpy()
        self._mask_of_row_array: Int32Array = self._mask_of_row.numpy()
        self._before: tuple[GrammarRows, Flight] | None = None

    def apply_plan(self, plan: PlanView) -> None:
        """See SlotGrammars; before anything of the step is launched."""
        self._grammars.apply_plan(plan)

    def prepare(self, slots: Int32Array, flight: Flight) -> None:
        """The masks of the sampling rows, of these slots, are on their way to the device.

        Called behind the launch of the forward pass, in steps with a grammar.  Waits for the
        step before, where that had one, and for the masks; so the pinned memory is free again.
        """
        if self._before is not None:
            rows, landing = self._before
            if not rows.accepted:
                landing.done.synchronize()
                rows.accept(landing.ids_array[: landing.count])
        found = self._grammars.rows_of(slots)
        rows = self._grammars.begin(found, slots, self._masks_array)
        flight.grammars = rows
        self._before = rows, flight
        self._grammars.finish(rows)
        masked = rows.outcome == 0
        self._mask_of_row_array.fill(-1)
        self._mask_of_row_array[found[masked]] = masked.nonzero()[0]
        count = len(found)
        self._tables.masks[:count].copy_(self._masks[:count], non_blocking=True)
        self._tables.mask_of_row.copy_(self._mask_of_row, non_blocking=True)
