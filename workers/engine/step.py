"""What a worker's loop and an engine agree on.  No torch here: the `sim` device has none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from ...ipc.plan import NOTHING, Int32Array, PlanView


class StepTimes(NamedTuple):
    """CLOCK_MONOTONIC, ns.  The device begins when the input is ready and the step before done."""

    ready_ns: int
    begun_ns: int
    forwarded_ns: int
    done_ns: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """rows: [R, 3] int32 (request, count, token), valid until the next step.

    forward_us: time of the forward pass.  logprobs: [n, LOGPROB_WORDS] int32, as in
    ipc/plan.py.  times: None where nothing was computed, and where the engine
    records them itself.
    """

    rows: Int32Array
    forward_us: int
    times: StepTimes | None = None
    logprobs: Int32Array = field(default_factory=lambda: NOTHING)


class WarmedUp(NamedTuple):
    """What an engine has found out of itself.

    swap_block_ns: what the copy of a KV block to host memory takes; 0 = there is none.
    num_blocks: KV blocks that there is memory for; 0 = as many as it was told.
    """

    swap_block_ns: int = 0
    num_blocks: int = 0


class StepEngine(Protocol):
    """One rank's part of a step; every rank of the group gets the same plans."""

    def warm_up(self) -> WarmedUp:
        """Does once whatever would make the first steps slow; before any plan."""
        ...

    def step(self, plan: PlanView, idle: bool) -> StepResult | None:
        """Carries out a plan; keeps no view of it beyond what plans_in_use() says.

        idle: the engine had nothing to do before this plan came.  None: the
        step is only begun, and the engine delivers the result itself when it is
        there, in the order of the plans.
        """
        ...

    def plans_in_use(self) -> int:
        """So many of the newest plans are still read where they lie; asked by the caller of step().

        Every one is done with when its result is there, at the latest.
        """
        ...

    def finish(self) -> None:
        """After the last plan: returns when every result has been delivered."""
        ...
