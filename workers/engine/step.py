"""What a worker's loop and an engine agree on.  No torch here: the `sim` device has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...ipc.plan import PlanView


@dataclass(frozen=True, slots=True)
class StepResult:
    """rows: [R, 3] int32 (request, count, token), valid until the next step.

    forward_us: time of the forward pass.
    """

    rows: npt.NDArray[np.int32]
    forward_us: int


class StepEngine(Protocol):
    """One rank's part of a step; every rank of the group gets the same plans."""

    def warm_up(self) -> None:
        """Does once whatever would make the first steps slow; before any plan."""
        ...

    def step(self, plan: PlanView, idle: bool) -> StepResult | None:
        """Carries out a plan; keeps no view of it.

        idle: the engine had nothing to do before this plan came.  None: the
        step is only begun, and the engine delivers the result itself when it is
        there, in the order of the plans.
        """
        ...

    def finish(self) -> None:
        """After the last plan: returns when every result has been delivered."""
        ...
