"""The `sim` device: a timer instead of a model, tokens by the formula of ipc/simulated.py.

It measures everything around the forward pass and drives scale tests.  A step
takes exactly step_ms: it starts when the last one ended if its plan was there
by then, else when the plan came, and it ends at an absolute time, so neither
late wake-ups nor the worker's own work add up.  No torch here.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from ...ipc.plan import LOGPROB_WORDS, MAX_TOP_LOGPROBS, NOTHING, Int32Array, PlanView
from ...ipc.simulated import MIX_OUT, MIX_POSITION, MIX_SEED
from .slot_state import SlotState
from .step import StepResult, StepTimes, WarmedUp

_TOP_LOGPROBS = LOGPROB_WORDS - MAX_TOP_LOGPROBS
_MINUS_INF_BITS = np.float32(-np.inf).view(np.int32)


class SimEngine:
    """Takes step_ms for every plan that has something to compute."""

    def __init__(self, slots: int, vocab_size: int, step_ms: float) -> None:
        self._state = SlotState(slots)
        self._vocab_size = np.uint32(vocab_size)
        self._step_ms = step_ms
        self._end_s = 0.0
        self._wants_logprobs = False
        self._seeds = np.zeros(slots, np.uint64)
        self._mixed = np.zeros(slots, np.uint32)
        self._shifted = np.zeros(slots, np.uint32)

    def warm_up(self) -> WarmedUp:
        """Nothing is slow the first time, and nothing is copied."""
        return WarmedUp()

    def step(self, plan: PlanView, idle: bool) -> StepResult:
        """See StepEngine.  Sleeps until the step's end."""
        self._state.take(plan.take)
        self._state.advance(plan)
        tokens = self._tokens()
        if len(plan.take):
            self._wants_logprobs = bool(self._state.logprobs.any())
        logprobs = NOTHING
        if self._wants_logprobs or len(plan.score):
            logprobs = self._logprobs(tokens, plan)
        rows = self._state.commit(tokens)
        if not len(plan.chunk) and not len(plan.decode):
            return StepResult(rows=rows, forward_us=0)
        times = self._sleep_through_step(idle)
        return StepResult(
            rows=rows, forward_us=round(self._step_ms * 1000), times=times, logprobs=logprobs
        )

    def plans_in_use(self) -> int:
        """A plan has been read when step() returns."""
        return 0

    def finish(self) -> None:
        """Every step has returned its result."""

    def _sleep_through_step(self, idle: bool) -> StepTimes:
        """Until the step's end; sampling takes no time."""
        now_s = time.monotonic()
        step_s = self._step_ms / 1000
        # A process that was kept from running may catch up on one step, not on more.
        start_s = now_s if idle else max(self._end_s, now_s - step_s)
        self._end_s = start_s + step_s
        if self._end_s > now_s:
            time.sleep(self._end_s - now_s)
        end_ns = round(self._end_s * 1e9)
        return StepTimes(round(now_s * 1e9), round(start_s * 1e9), end_ns, end_ns)

    def _logprobs(self, tokens: Int32Array, plan: PlanView) -> Int32Array:
        """Records of tokens of which the engine was certain: logprob 0, rank 1, no other token."""
        rows, scores = self._state.rows, self._state.scores(plan)
        best = self._state.logprobs[rows.slots]
        wanted = np.flatnonzero(best)
        records = np.zeros((len(wanted) + len(scores), LOGPROB_WORDS), np.int32)
        records[:, 0] = np.append(rows.requests[wanted], scores.requests)
        records[:, 1] = np.append(rows.positions[wanted], scores.positions)
        records[:, 3] = 1
        records[:, 4:_TOP_LOGPROBS] = -1
        records[:, _TOP_LOGPROBS:] = _MINUS_INF_BITS
        told = np.append(tokens[wanted], scores.tokens)
        has_best = np.append(best[wanted] > 1, np.ones(len(scores), bool))
        records[has_best, 4] = told[has_best]
        records[has_best, _TOP_LOGPROBS] = 0
        return records

    def _tokens(self) -> npt.NDArray[np.int32]:
        """sim_token of every sampling row, [R], valid until the next call."""
        rows = self._state.rows
        mixed, shifted = self._mixed[: len(rows)], self._shifted[: len(rows)]
        seeds = self._seeds[: len(rows)]
        np.take(self._state.params.seed, rows.slots, out=seeds)
        np.copyto(mixed, seeds, casting="unsafe")
        mixed *= MIX_SEED
        np.multiply(rows.positions.view(np.uint32), MIX_POSITION, out=shifted)
        mixed += shifted
        np.right_shift(mixed, 15, out=shifted)
        mixed ^= shifted
        mixed *= MIX_OUT
        mixed >>= 8
        mixed %= self._vocab_size
        return mixed.view(np.int32)
