"""What a step will take, and the chunk that fits a target."""

from __future__ import annotations

import random

import pytest

from albireo.scheduler.step_times import StepTimes

from .groups import group
from .submissions import submission


def learned(base_us: float, token_us: float, noise: float = 0.0) -> StepTimes:
    """After 60 steps, half of them with prefill."""
    rng = random.Random(5)
    times = StepTimes()
    for step in range(60):
        tokens = rng.randint(16, 512) if step % 2 else 0
        us = (base_us + token_us * tokens) * rng.uniform(1 - noise, 1 + noise)
        times.add(tokens, round(us))
    return times


def test_a_line_is_found() -> None:
    times = learned(3000, 20)
    assert times.expected_us(132) == pytest.approx(3000 + 20 * 132, rel=0.01)
    assert times.token_us == pytest.approx(20, rel=0.02)


def test_a_noisy_line_with_outliers_is_found() -> None:
    times = learned(3000, 20, noise=0.1)
    for _ in range(3):
        times.add(0, 2_000_000)
    assert times.expected_us(300) == pytest.approx(9000, rel=0.3)


def test_steady_decode_does_not_forget_the_slope() -> None:
    times = learned(3000, 20)
    rng = random.Random(1)
    for _ in range(2000):
        times.add(rng.choice([0, 0, 1]), 3640 + rng.randint(-200, 200))
    assert times.token_us == pytest.approx(20, rel=0.1)
    assert times.expected_us(0) == pytest.approx(3640, rel=0.05)


def test_a_chunk_fits_the_target() -> None:
    times = learned(3000, 20)
    chunk = times.chunk_tokens(10_000)
    assert times.expected_us(chunk) == pytest.approx(10_000, rel=0.02)
    assert times.chunk_tokens(2_000) == 16  # Prompts go on whatever the target.
    # Not far beyond what was measured.
    assert times.chunk_tokens(10_000_000) <= 2 * 512


def test_the_first_chunks_are_careful() -> None:
    times = StepTimes()
    assert times.chunk_tokens(10_000) == 128
    for _ in range(20):
        times.add(0, 3000)
    assert times.chunk_tokens(10_000) == 128
    assert times.chunk_tokens(2_000) == 16


def test_steps_with_prefill_stay_below_the_target() -> None:
    target_ms = 8.0
    made = group(
        max_num_seqs=16, max_num_batched_tokens=2048, max_model_len=4096, block_size=16,
        num_blocks=4096, itl_target_ms=target_ms,
    )  # fmt: skip

    def step_us(tokens: int) -> int:
        return 2000 + 10 * tokens

    made.step_us = step_us
    for request in range(1, 9):
        made.submit(submission(request, prompt_len=8, max_tokens=400))
    for _ in range(10):
        made.plan()
        made.finish_step()
    made.submit(submission(9, prompt_len=3000, max_tokens=2))
    beside = []
    while not made.streams[9].tokens:
        plan = made.plan()
        if plan is None:
            made.finish_step()
        elif len(plan.chunk_token):
            beside.append(len(plan.chunk_token))
            assert step_us(len(plan.chunk_token) + len(plan.decode)) <= target_ms * 1000 * 1.02
    assert max(beside) > 500  # It is used, too.

    alone = group(
        max_num_batched_tokens=2048, max_model_len=4096, block_size=16, num_blocks=4096,
        itl_target_ms=target_ms,
    )  # fmt: skip
    alone.submit(submission(1, prompt_len=3000, max_tokens=2))
    plan = alone.plan()
    assert plan is not None
    assert len(plan.chunk_token) == 2048  # There is nobody whose next token waits for it.
