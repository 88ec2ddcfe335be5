"""The `sim` engine: its tokens are those of the formula, its time is that of a timer."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest

from albireo.ipc.plan import LOGPROB_WORDS, TAKE_LOGPROBS, PlanView, split64
from albireo.ipc.simulated import sim_token
from albireo.workers.engine.sim import SimEngine

from ..plans import plan_of

VOCAB = 49152
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 123456789012345678]


def plan(
    takes: list[list[int]] | None = None,
    chunks: list[list[int]] | None = None,
    decodes: list[int] | None = None,
) -> PlanView:
    chunks = chunks or []
    tokens = [0] * sum(chunk[2] for chunk in chunks)
    return plan_of(
        16, 4096, 16, 4096,
        take=takes or [], chunk=chunks, chunk_token=tokens, decode=decodes or [],
    )  # fmt: skip


def take(slot: int, request: int, seed: int, start: int = 0) -> list[int]:
    return [slot, request, *split64(seed), 0, 0, 0, 0, 0, start]


def test_tokens_are_those_of_the_formula_at_every_position() -> None:
    engine = SimEngine(16, VOCAB, 0.0)
    starts = [0, 5, 100, 8000, 3, 1]
    slots = range(len(SEEDS))
    takes = [take(slot, 100 + slot, SEEDS[slot], starts[slot]) for slot in slots]
    chunks = [[slot, starts[slot], 4, 1] for slot in slots]
    result = engine.step(plan(takes, chunks), idle=True)
    for step in range(50):
        expected = [
            [100 + slot, 1, sim_token(SEEDS[slot], starts[slot] + 4 + step, VOCAB)]
            for slot in slots
        ]
        assert result.rows.tolist() == expected
        result = engine.step(plan(decodes=list(slots)), idle=False)


def test_a_chunk_before_the_last_has_no_row() -> None:
    engine = SimEngine(16, VOCAB, 0.0)
    first = engine.step(plan([take(3, 7, 11)], [[3, 0, 5, 0]]), idle=True)
    assert first.rows.shape == (0, 3)
    second = engine.step(plan(chunks=[[3, 5, 5, 1]]), idle=False)
    assert second.rows.tolist() == [[7, 1, sim_token(11, 10, VOCAB)]]


def test_a_slot_taken_again_answers_for_its_new_request() -> None:
    engine = SimEngine(16, VOCAB, 0.0)
    engine.step(plan([take(3, 7, 11)], [[3, 0, 5, 1]]), idle=True)
    result = engine.step(plan([take(3, 8, 12)], [[3, 0, 2, 1]]), idle=False)
    assert result.rows.tolist() == [[8, 1, sim_token(12, 2, VOCAB)]]


def test_logprobs_are_those_of_an_engine_that_is_certain() -> None:
    engine = SimEngine(16, VOCAB, 0.0)
    asking, silent = take(3, 7, 11), take(4, 8, 12)
    asking += [0] * (TAKE_LOGPROBS - len(asking)) + [3]
    chunks = [[3, 0, 5, 1], [4, 0, 2, 1]]
    scored = plan_of(
        16, 4096, 16, 4096, take=[asking, silent], chunk=chunks, chunk_token=[9] * 7,
        score=[[0, 90], [6, 91]],
    )  # fmt: skip
    records = engine.step(scored, idle=True).logprobs
    assert records.shape == (3, LOGPROB_WORDS)
    token = sim_token(11, 5, VOCAB)
    assert records[:, :6].tolist() == [
        [7, 5, 0, 1, token, -1], [7, 1, 0, 1, 90, -1], [8, 2, 0, 1, 91, -1],
    ]  # fmt: skip
    floats = records.view(np.float32)
    assert (floats[:, 24] == 0.0).all()
    assert (floats[:, 25:] == -np.inf).all()
    assert len(engine.step(plan(decodes=[4]), idle=False).logprobs) == 0


class FakeTime:
    """A clock that oversleeps by `late_s`."""

    def __init__(self, late_s: float) -> None:
        self.now_s = 50.0
        self.late_s = late_s

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds + self.late_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    clock = FakeTime(late_s=0.001)
    monkeypatch.setattr("albireo.workers.engine.sim.time", clock)
    return clock


def test_late_wake_ups_and_work_between_steps_do_not_add_up(clock: FakeTime) -> None:
    engine = SimEngine(16, VOCAB, 10.0)
    result = engine.step(plan([take(0, 1, 1)], [[0, 0, 1, 1]]), idle=True)
    assert result.forward_us == 10_000
    for _ in range(99):
        clock.now_s += 0.002  # The worker's own work.
        engine.step(plan(decodes=[0]), idle=False)
    assert clock.now_s == pytest.approx(50.0 + 100 * 0.010 + 0.001)


def test_after_a_pause_a_step_starts_when_its_plan_comes(clock: FakeTime) -> None:
    engine = SimEngine(16, VOCAB, 10.0)
    engine.step(plan([take(0, 1, 1)], [[0, 0, 1, 1]]), idle=True)
    clock.now_s = 60.0
    engine.step(plan(decodes=[0]), idle=True)
    assert clock.now_s == pytest.approx(60.0 + 0.010 + 0.001)


def test_a_stalled_process_catches_up_on_one_step_only(clock: FakeTime) -> None:
    engine = SimEngine(16, VOCAB, 10.0)
    engine.step(plan([take(0, 1, 1)], [[0, 0, 1, 1]]), idle=True)
    clock.now_s = 60.0
    for _ in range(3):
        engine.step(plan(decodes=[0]), idle=False)
    assert clock.now_s == pytest.approx(60.0 + 2 * 0.010 + 0.001)


def test_a_plan_without_work_takes_no_time(clock: FakeTime) -> None:
    result = SimEngine(16, VOCAB, 10.0).step(plan(), idle=True)
    assert clock.now_s == 50.0
    assert result.forward_us == 0


def test_real_steps_take_their_time() -> None:
    engine = SimEngine(16, VOCAB, 4.0)
    start_s = time.monotonic()
    engine.step(plan([take(0, 1, 1)], [[0, 0, 1, 1]]), idle=True)
    for _ in range(24):
        engine.step(plan(decodes=[0]), idle=False)
    assert 0.100 <= time.monotonic() - start_s < 2.0


def test_the_sim_device_needs_no_torch() -> None:
    code = "import sys, albireo.workers.engine.process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
