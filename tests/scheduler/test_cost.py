"""What a step costs does not grow with the requests about which nothing changes."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import msgspec
import numpy as np
import pytest

from albireo.ipc.plan import ROW_WORDS, Int32Array
from albireo.scheduler.limits import Limits
from albireo.scheduler.scheduler import Scheduler

from .submissions import submission

BLOCK_SIZE = 16


class Decoding:
    """A scheduler with so many requests that all decode, each in the middle of a block."""

    def __init__(self, batch: int, prompt_len: int = 2 * BLOCK_SIZE + 1) -> None:
        self.scheduler = Scheduler(
            Limits(
                max_num_seqs=256, max_num_batched_tokens=16_384, max_model_len=256,
                block_size=BLOCK_SIZE, num_blocks=4096, lookahead=1,
            )
        )  # fmt: skip
        for number in range(1, batch + 1):
            submit = submission(number, prompt_len, 60, stop_token_ids=(99,))
            self.scheduler.submit(msgspec.structs.replace(submit, prompt_ids=[number] * prompt_len))
        self._results: list[tuple[int, Int32Array]] = []
        while self.scheduler.counters.steps < 3:
            self.step()
        assert self.scheduler.running == batch

    def step(self) -> None:
        """A plan, and the result of the one before it."""
        while (plan := self.scheduler.plan()) is not None:
            rows = np.ones((len(plan.sampled), ROW_WORDS), dtype=np.int32)
            rows[:, 0] = plan.sampled
            self._results.append((plan.step, rows))
        self.scheduler.apply(*self._results.pop(0), 5000)


class Untouchable(list[Any]):
    """What nothing may look at."""

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError(f"the request of slot {index} is touched")

    def __iter__(self) -> Any:
        raise AssertionError("the requests are gone through")


class UntouchableMap(dict[int, Any]):
    def __getitem__(self, number: int) -> Any:
        raise AssertionError(f"request {number} is touched")

    get = __getitem__

    def _all(self) -> Any:
        raise AssertionError("the requests are gone through")

    __iter__ = values = items = keys = _all


@pytest.mark.parametrize("batch", [1, 256])
def test_a_step_in_which_nothing_changes_touches_no_request(batch: int) -> None:
    made = Decoding(batch)
    state = made.scheduler._state
    made.scheduler.sequences._occupants = Untouchable(made.scheduler.sequences._occupants)
    state.requests = UntouchableMap(state.requests)
    generated = made.scheduler.counters.generated_tokens
    for _ in range(6):
        made.step()
    assert made.scheduler.counters.generated_tokens == generated + 6 * batch
    with pytest.raises(AssertionError, match="is touched"):
        for _ in range(BLOCK_SIZE):  # until a block is full, and gets its name
            made.step()


def instructions(call: Callable[[], None]) -> int:
    """How many the interpreter executes, those of numpy's Python functions among them."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    gc.collect()  # Of what earlier tests have left nothing is to be finalized meanwhile.
    gc.disable()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


def test_the_interpreter_does_as_much_for_one_request_as_for_256() -> None:
    few, many = Decoding(1), Decoding(256)
    for _ in range(6):
        taken = instructions(few.step), instructions(many.step)
        assert taken[0] == taken[1] > 100
