"""How prompts share steps with the decodes that wait for them."""

from __future__ import annotations

import pytest

from albireo.scheduler.chunk_budget import LEAST_SHARE, chunk_budget
from albireo.scheduler.limits import Limits
from albireo.scheduler.step_times import StepTimes

from .fake_group import FakeGroup
from .groups import group
from .submissions import submission

LIMITS = Limits(
    max_num_seqs=512, max_num_batched_tokens=2048, max_model_len=4096, block_size=16,
    num_blocks=8192, lookahead=1, mixed_step_tokens=512,
)  # fmt: skip


@pytest.mark.parametrize(
    ("decodes", "prompt_tokens", "budget"),
    [
        (0, 100, 2048),  # nobody waits for it
        (1, 100, 511),
        (64, 128 * 14, 448),
        (64, 448 * LEAST_SHARE, 448),
        (64, 448 * LEAST_SHARE + 1, 449),
        (64, 1 << 20, 1984),
        (65, 100, 1983),  # chunks would be small ones
        (2048, 100, 0),
    ],
)
def test_a_step_is_filled_and_many_prompts_are_spread(
    decodes: int, prompt_tokens: int, budget: int
) -> None:
    assert chunk_budget(LIMITS, StepTimes(), decodes, prompt_tokens) == budget


def _decoding(streams: int, **limits: int) -> FakeGroup:
    made = group(
        max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=4096, block_size=16,
        num_blocks=8192, **limits,
    )  # fmt: skip
    for request in range(1, streams + 1):
        made.submit(submission(request, prompt_len=8, max_tokens=1000))
    made.plan()
    made.finish_step()
    return made


def _chunks(made: FakeGroup, steps: int) -> list[int]:
    """Prompt tokens of each of the next steps."""
    found = []
    for _ in range(steps):
        plan = made.plan()
        assert plan is not None
        found.append(len(plan.chunk_token))
        made.finish_step()
    return found


def test_prompts_beside_decodes_come_in_small_steps() -> None:
    made = _decoding(32, mixed_step_tokens=512)
    for request in range(101, 115):
        made.submit(submission(request, prompt_len=128, max_tokens=2))
    chunks = _chunks(made, 5)
    # Who is through with its prompt decodes, once, beside the next ones.
    assert chunks == [480, 477, 476, 359, 0]
    assert sum(chunks) == 14 * 128


def test_what_is_under_way_counts_with_what_waits() -> None:
    """A long prompt gets larger steps at first, whether it has a slot yet or not."""
    made = _decoding(8, mixed_step_tokens=64)
    made.submit(submission(101, prompt_len=3200, max_tokens=2))
    chunks = _chunks(made, 60)
    assert chunks[:3] == [200, 188, 176]
    assert chunks == sorted(chunks, reverse=True)
    assert chunks.count(56) > 10 and chunks[-1] == 0
    assert sum(chunks) == 3200


def test_without_the_limit_a_step_takes_all() -> None:
    made = _decoding(32)
    made.submit(submission(101, prompt_len=2500, max_tokens=2))
    assert _chunks(made, 2) == [2016, 484]
