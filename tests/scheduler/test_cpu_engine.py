"""The policy with the real engine of the CPU: pressure does not change a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from albireo.ipc.messages import Submit
from albireo.ipc.plan import PlanView, plan_bytes, write_plan
from albireo.scheduler.limits import Limits
from albireo.scheduler.scheduler import Ended, Scheduler
from albireo.workers.engine.engine import Engine
from albireo.workers.kernels.cpu.kernels import CpuKernels
from albireo.workers.models.load import load_model
from albireo.workers.parallel.communicator import SingleRank

from ..workers.engine_driver import ENGINE
from ..workers.engine_story import CONFIG
from .submissions import submission

EASE = msgspec.structs.replace(
    ENGINE, block_size=16, num_blocks=80, max_num_seqs=20, max_num_batched_tokens=256,
    prefix_caching=False, batch_invariant=True, lookahead=0,
)  # fmt: skip
REQUESTS = 20


def submissions() -> list[Submit]:
    """Some share their first 20 tokens, two are equal, some are greedy, one is penalised."""
    made = []
    for number in range(1, REQUESTS + 1):
        how: dict[str, Any] = {"temperature": 0.0 if number % 3 else 0.9}
        if number == 5:
            how["repetition_penalty"] = 1.3
        seed = 20_000 + (number if number < 18 else 7)
        made.append(submission(number, 16 + number % 9, 24, seed=seed, top_k=0, **how))
    return made


GiveUp = Callable[[Scheduler, list[Ended], dict[int, int]], list[int]]


def answers(
    engine: Any,
    limits: Any,
    made: list[Submit] | None = None,
    give_up: GiveUp = lambda scheduler, ended, running: [],
) -> tuple[dict[int, list[int]], Scheduler]:
    """Tokens of each request, from a scheduler and an engine alone.

    give_up: of requests that go on behind a result, and have so many tokens then, those that
    are aborted.
    """
    kernels = CpuKernels(torch.float32, True)
    (model,) = load_model("", CONFIG, torch.float32, "dummy", 1, kernels, lambda line: None)
    worker = Engine(model, kernels, engine, SingleRank())
    scheduler = Scheduler(limits)
    tokens: dict[int, list[int]] = {}
    for submit in made or submissions():
        assert scheduler.submit(submit) is None
        tokens[submit.request] = []
    going_on = set(tokens)
    frame = memoryview(
        bytearray(
            plan_bytes(
                engine.max_num_seqs, engine.max_num_batched_tokens, engine.block_size,
                engine.max_model_len,
            )
        )
    )  # fmt: skip
    results: list[tuple[int, Any]] = []
    while not scheduler.idle:
        while (plan := scheduler.plan()) is not None:
            length = write_plan(frame, plan.step, 0, plan.sections)
            view = PlanView(memoryview(bytes(frame[:length])))
            results.append((plan.step, worker.step(view, False).rows.copy()))
        step, rows = results.pop(0)
        ended = scheduler.apply(step, rows, step_us=100)
        for request, count, token in rows.tolist():
            # Else it is the surplus row of a request that has ended: nobody sees it.
            if request in going_on:
                assert count == 1
                tokens[request].append(token)
        going_on -= {end.request for end in ended}
        running = {row[0]: len(tokens[row[0]]) for row in rows.tolist() if row[0] in going_on}
        for request in give_up(scheduler, ended, running):
            assert scheduler.abort(request)
            going_on.discard(request)
    scheduler.check_idle()
    return tokens, scheduler


@pytest.fixture(scope="module")
def at_ease() -> dict[int, list[int]]:
    tokens, scheduler = answers(EASE, Limits.of(EASE))
    assert scheduler.counters.preemptions == 0
    assert all(len(of_one) == 24 for of_one in tokens.values())
    return tokens


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("num_swap_blocks", [0, 8])
def test_a_tenth_of_the_cache_gives_the_same_tokens(
    at_ease: dict[int, list[int]], prefix_caching: bool, num_swap_blocks: int
) -> None:
    # The twenty fill 60 blocks at their ends.
    pressed = msgspec.structs.replace(
        EASE, num_blocks=5, max_num_seqs=4, max_num_batched_tokens=24, lookahead=1,
        prefix_caching=prefix_caching, num_swap_blocks=num_swap_blocks,
    )  # fmt: skip
    tokens, scheduler = answers(pressed, Limits.of(pressed))
    assert tokens == at_ease
    assert scheduler.counters.preemptions > 0
    assert (scheduler.counters.prefix_hit_tokens > 0) == prefix_caching
    assert (scheduler.counters.swapped_out_blocks > 0) == (num_swap_blocks > 0)


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_a_stop_an_abort_and_a_preemption_at_one_step_change_no_token(
    at_ease: dict[int, list[int]], lookahead: int
) -> None:
    """With steps ahead as without: what stops late, or is given up, is no token more or less."""
    pressed = msgspec.structs.replace(
        EASE, num_blocks=11, max_num_seqs=6, max_num_batched_tokens=64, lookahead=lookahead
    )
    preemptions = [0]
    moments: list[tuple[int, int, int]] = []

    def look(scheduler: Scheduler, ended: list[Ended], running: dict[int, int]) -> list[int]:
        """Notes two that run on when another has just had to leave: one has a token it had not."""
        before, preemptions[0] = preemptions[0], scheduler.counters.preemptions
        if preemptions[0] > before and len(running) > 1:
            for one, count in running.items():
                if at_ease[one].index(at_ease[one][count - 1]) == count - 1:
                    moments.append((one, count, next(other for other in running if other != one)))
        return []

    assert answers(pressed, Limits.of(pressed), give_up=look)[0] == at_ease
    stopped, count, aborted = moments[0]
    stop = at_ease[stopped][count - 1]
    made = [
        msgspec.structs.replace(submit, stop_token_ids=(stop,))
        if submit.request == stopped
        else submit
        for submit in submissions()
    ]
    met = []

    def meet(scheduler: Scheduler, ended: list[Ended], running: dict[int, int]) -> list[int]:
        before, preemptions[0] = preemptions[0], scheduler.counters.preemptions
        if (stopped, "stop") not in [(end.request, end.reason) for end in ended]:
            return []
        met.append(preemptions[0] > before)
        return [aborted]

    preemptions[0] = 0
    tokens, _ = answers(pressed, Limits.of(pressed), made, meet)
    assert met == [True]
    assert tokens.pop(stopped) == at_ease[stopped][:count]
    given_up = tokens.pop(aborted)
    assert 0 < len(given_up) < 24 and given_up == at_ease[aborted][: len(given_up)]
    assert tokens.items() <= at_ease.items()
