"""Too few blocks: who is preempted, and what is kept in host memory."""

from __future__ import annotations

from albireo.ipc.plan import COPY_IN, COPY_OUT

from .fake_group import FakeGroup
from .groups import group, starts, step, taken
from .submissions import submission


def pressed(*, max_tokens: int = 9, **limits: object) -> FakeGroup:
    """Two requests that do not fit together to their ends; the second is being preempted."""
    made = group(**({"block_size": 2, "num_blocks": 7, "max_num_seqs": 2} | limits))
    for request in (1, 2):
        made.submit(submission(request, prompt_len=4, max_tokens=max_tokens))
    while made.scheduler.counters.preemptions == 0:
        if made.plan() is None:
            made.finish_step()
    return made


def until_taken(made: FakeGroup, request: int):
    while True:
        plan = made.plan()
        if plan is None:
            made.finish_step()
        elif request in taken(plan):
            return plan


def test_blocks_are_kept_in_host_memory_and_come_back() -> None:
    made = pressed(num_swap_blocks=8)
    counters = made.scheduler.counters
    computed = int(made.worker.slots[made.worker_slot(2)].position)
    assert counters.swapped_out_blocks == -(-computed // 2)
    plan = until_taken(made, 2)
    assert starts(plan) == [computed]
    assert [kind for kind, _, _ in plan.copy.tolist()] == [COPY_IN] * counters.swapped_out_blocks
    host = made.scheduler.memory.host
    assert host.free == 8 - len(plan.copy)  # The plan reads it: not before the result.
    # What the result of the step in flight told, and nothing else, is computed anew.
    assert plan.chunk[:, 1:].tolist() == [[computed, 1, 1]]
    made.run()
    made.check_streams()
    assert counters.swapped_in_blocks == counters.swapped_out_blocks


def test_host_memory_that_is_too_small_keeps_the_beginning() -> None:
    made = pressed(num_swap_blocks=2)
    assert starts(until_taken(made, 2)) == [4]
    made.run()
    made.check_streams()


def test_what_the_prefix_cache_still_has_does_not_come_from_host_memory() -> None:
    made = pressed(num_swap_blocks=8, prefix_caching=True)
    plan = until_taken(made, 2)
    assert 0 < len(plan.copy) < made.scheduler.counters.swapped_out_blocks
    made.run()
    made.check_streams()


def test_it_is_computed_again_when_that_takes_less() -> None:
    for block_us, swapped in ((1.0, True), (50.0, False)):
        made = group(block_size=2, num_blocks=19, max_num_seqs=2, num_swap_blocks=20)
        made.scheduler.swap_block_us = block_us
        made.step_us = lambda tokens: 1000 + 20 * tokens
        for request in (1, 2):
            made.submit(submission(request, prompt_len=16, max_tokens=9))
        made.run()
        made.check_streams()
        assert made.scheduler.counters.preemptions > 0
        assert (made.scheduler.counters.swapped_out_blocks > 0) == swapped


def test_what_is_given_up_while_it_is_swapped_out_leaves_nothing() -> None:
    made = pressed(num_swap_blocks=8)
    host = made.scheduler.memory.host
    assert host.free < 8
    made.abort(2)
    assert host.free < 8  # The copy has not been made yet.
    while made.in_flight:
        made.finish_step()
    assert host.free == 8
    made.run()

    made = pressed(num_swap_blocks=8)
    while made.in_flight:
        made.finish_step()
    made.abort(2)
    assert made.scheduler.memory.host.free == 8
    made.run()


def test_blocks_that_are_copied_out_are_not_given_away_before_the_result() -> None:
    made = pressed(num_swap_blocks=8)
    copied = made.in_flight[-1].copied
    assert copied
    assert made.plan() is None or not copied & set(made.scheduler.pool._stack.free_blocks())
    made.run()


def test_the_less_important_goes_first_whenever_it_came() -> None:
    made = group(block_size=2, num_blocks=7, max_num_seqs=2)
    made.submit(submission(1, prompt_len=4, max_tokens=9, priority=1))
    made.submit(submission(2, prompt_len=4, max_tokens=9))
    while made.scheduler.counters.preemptions == 0:
        if made.plan() is None:
            made.finish_step()
    assert made.scheduler.waiting_by_priority == {1: 1}
    made.run()
    made.check_streams()


def test_plans_with_swapping_have_work_besides_copies() -> None:
    """Both stall at once: nothing else could be in the plan, so nothing is copied."""
    made = group(block_size=2, num_blocks=6, max_num_seqs=2, num_swap_blocks=8)
    for request in (1, 2):
        made.submit(submission(request, prompt_len=4, max_tokens=9))
    plans = []
    while made.scheduler.counters.preemptions == 0:
        plans.append(made.plan())
        if plans[-1] is None:
            made.finish_step()
    assert made.scheduler.counters.swapped_out_blocks == 0
    made.run()
    assert COPY_OUT not in [kind for plan in plans if plan for kind, _, _ in plan.copy.tolist()]


def test_prompt_logprobs_are_told_once_also_by_one_that_makes_way() -> None:
    made = group(max_num_seqs=2, max_num_batched_tokens=4)
    made.submit(submission(1, max_tokens=30))
    made.submit(submission(2, prompt_len=20, max_tokens=3, priority=1, prompt_logprobs=0))
    for _ in range(4):
        step(made)
    assert 0 < len(made.worker.scored[2]) < 19
    made.submit(submission(3, max_tokens=2))
    made.run()
    assert made.scheduler.counters.preemptions == 1
    made.check_streams()
