"""The policy, rule by rule; test_state_machine.py has everything at once."""

from __future__ import annotations

import numpy as np
import pytest

from albireo.ipc.plan import (
    TAKE_MIN_P,
    TAKE_PROMPT_LEN,
    TAKE_REQUEST,
    TAKE_SEED_HI,
    TAKE_SEED_LO,
    TAKE_START,
    TAKE_TEMPERATURE,
    TAKE_TOP_K,
    TAKE_TOP_P,
)

from .groups import group, lengths, step, taken
from .submissions import expected_end, submission, token_at


# ------------------------------------------------------------ what a plan holds
def test_a_take_carries_the_sampling_state_bit_by_bit() -> None:
    made = group()
    made.submit(submission(9, prompt_len=3, seed=-5))
    words = made.scheduler.plan().sections.take[0]
    floats = words.view(np.float32)
    assert words[TAKE_REQUEST] == 9
    assert (words[TAKE_SEED_LO], words[TAKE_SEED_HI]) == (-5, -1)
    assert floats[[TAKE_TEMPERATURE, TAKE_TOP_P, TAKE_MIN_P]].tolist() == [0.5, 0.25, 0.125]
    assert (words[TAKE_TOP_K], words[TAKE_PROMPT_LEN], words[TAKE_START]) == (7, 3, 0)


def test_prefill_then_decode() -> None:
    made = group()
    made.submit(submission(1, prompt_len=5, max_tokens=3))
    first = step(made)
    assert taken(first) == [1]
    assert first.append[:, 1].tolist() == [0, 1]
    assert first.chunk[:, 1:].tolist() == [[0, 5, 1]]
    assert first.chunk_token.tolist() == [token_at(1, position) for position in range(5)]
    assert first.decode.size == 0
    second = step(made)
    assert (len(second.take), len(second.append), len(second.chunk)) == (0, 0, 0)
    assert second.decode.tolist() == first.chunk[:, 0].tolist()
    made.run()
    assert made.streams[1].tokens == expected_end(made.streams[1].submit)[1]


@pytest.mark.parametrize(("step_us", "wait_us"), [(20_000, 0.0), (40_000, 30_000.0)])
def test_behind_a_long_step_the_next_plan_waits_for_requests(step_us: int, wait_us: float) -> None:
    scheduler = group().scheduler
    scheduler.submit(submission(1, prompt_len=5, max_tokens=9))
    for _ in range(9):
        scheduler.step_times.add(0, step_us)
    assert scheduler.plan_after_us() == 0.0  # Nothing runs.
    assert scheduler.plan() is not None
    assert scheduler.plan_after_us() == pytest.approx(wait_us)
    assert scheduler.plan() is not None
    assert scheduler.plan_after_us() == 0.0  # No other plan is made now.


@pytest.mark.parametrize(("step_us", "wait_us"), [(7_000, 0.0), (10_000, 7_500.0)])
def test_behind_an_end_the_next_plan_waits_for_who_asks_again(step_us: int, wait_us: float) -> None:
    made = group()
    made.step_us = lambda tokens: step_us
    scheduler = made.scheduler
    made.submit(submission(1, prompt_len=5, max_tokens=3))
    made.submit(submission(2, prompt_len=5, max_tokens=9))
    while made.streams[1].end is None:
        made.plan()
        assert scheduler.plan_after_us() == 0.0
        made.finish_step()
    made.plan()
    assert scheduler.plan_after_us() == pytest.approx(wait_us)
    made.submit(submission(3, prompt_len=60, max_tokens=3))
    made.submit(submission(4, prompt_len=60, max_tokens=3))
    assert scheduler.plan_after_us() == 0.0  # Who waits fills the next step.
    made.abort(3)
    made.abort(4)
    made.plan()
    made.finish_step()
    assert scheduler.plan_after_us() == 0.0  # Nobody has ended with this one.


def test_a_plan_does_not_wait_for_longer_than_the_last_decodes_took() -> None:
    made = group()
    made.step_us = lambda tokens: 40_000
    scheduler = made.scheduler
    made.submit(submission(1, prompt_len=5, max_tokens=20))
    for _ in range(12):
        step(made)
    made.plan()
    assert scheduler.plan_after_us() == pytest.approx(30_000.0)
    made.step_us = lambda tokens: 32_000
    made.plan()
    made.finish_step()
    made.finish_step()
    made.plan()
    assert scheduler.plan_after_us() == pytest.approx(24_000.0)


def test_a_block_is_appended_only_when_the_last_one_is_full() -> None:
    made = group(block_size=4)
    made.submit(submission(1, prompt_len=3, max_tokens=7))
    appended = [step(made).append[:, 1].tolist() for _ in range(7)]
    # Positions 0-2, then 3, 4 (a new block), 5, 6, 7, 8 (another).
    assert appended == [[0], [], [1], [], [], [], [2]]


def test_long_prompts_come_in_chunks_and_decodes_come_first() -> None:
    made = group(max_num_batched_tokens=8)
    made.submit(submission(1, prompt_len=4, max_tokens=20))
    step(made)
    made.submit(submission(2, prompt_len=12, max_tokens=2))
    made.submit(submission(3, prompt_len=6, max_tokens=2))
    plans = [step(made) for _ in range(4)]
    assert [plan.decode.size for plan in plans] == [1, 1, 2, 2]
    assert [lengths(plan) for plan in plans] == [[7], [5, 2], [4], []]
    assert [plan.chunk[:, 3].tolist() for plan in plans] == [[0], [1, 0], [1], []]
    assert plans[1].append.tolist()[0][1] == 2  # its second chunk begins in a block it has
    made.run()


def test_slots_bound_what_runs() -> None:
    made = group(max_num_seqs=2)
    for request in (1, 2, 3):
        made.submit(submission(request, max_tokens=3))
    assert taken(step(made)) == [1, 2]
    assert (made.scheduler.running, made.scheduler.waiting) == (2, 1)
    made.run()
    assert made.admitted == [1, 2, 3]


# ------------------------------------------------------------ ahead of the results
@pytest.mark.parametrize(
    ("lookahead", "step_us", "in_flight"),
    [(0, 100, 1), (1, 100, 2), (2, 900, 3), (2, 1_100, 2), (2, None, 2)],
)
def test_plans_in_flight_are_bounded(lookahead: int, step_us: int | None, in_flight: int) -> None:
    """More than two only where steps are known to be so short that the next plan would be late."""
    made = group(lookahead=lookahead)
    made.submit(submission(1, max_tokens=30))
    if step_us is not None:
        made.scheduler.step_times.add(0, step_us)
    plans = 0
    while made.plan() is not None:
        plans += 1
    assert plans == in_flight
    made.finish_step()
    assert made.plan() is not None


def test_behind_a_prefill_as_much_lies_as_behind_a_decode() -> None:
    """What the running step takes does not count: its result comes when it has ended."""
    made = group(lookahead=2)
    for tokens, step_us in [(0, 600), (40, 40_000)] * 3:
        made.scheduler.step_times.add(tokens, step_us)
    made.submit(submission(1, prompt_len=40, max_tokens=20))
    chunks = [len(plan.chunk) for plan in iter(made.plan, None)]
    assert chunks == [1, 0, 0]
    made.submit(submission(2, prompt_len=40, max_tokens=20))
    made.finish_step()
    chunks = [len(plan.chunk) for plan in iter(made.plan, None)]
    assert chunks == [1]  # Two short steps and a long one.
    made.finish_step()
    assert made.plan() is None  # A short one runs, and the long one lies behind it.


def test_no_step_is_planned_past_the_length() -> None:
    made = group()
    made.submit(submission(1, max_tokens=2))
    assert made.plan() is not None
    assert made.plan() is not None
    made.finish_step()
    assert made.plan() is None  # Both tokens are planned.
    made.finish_step()
    assert made.scheduler.idle
    assert made.scheduler.counters.steps == 2


def test_a_late_stop_costs_one_row_and_holds_slot_and_blocks_until_it_came() -> None:
    made = group(max_num_seqs=1, num_spare_slots=0)
    stop = token_at(1, 4)
    made.submit(submission(1, prompt_len=4, max_tokens=20, stop_token_ids=(stop,)))
    made.submit(submission(2, prompt_len=4, max_tokens=1))
    made.plan()
    made.plan()
    made.finish_step()  # The stop token; the next step is in flight.
    assert made.streams[1].end == "stop"
    assert made.plan() is None
    assert made.scheduler.pool.free < made.limits.num_blocks
    made.finish_step()
    assert made.scheduler.pool.free == made.limits.num_blocks
    assert made.scheduler.counters.generated_tokens == 1
    assert taken(step(made)) == [2]


def test_whoever_comes_next_takes_a_spare_slot() -> None:
    made = group(max_num_seqs=1, num_spare_slots=1)
    made.submit(submission(1, prompt_len=4, max_tokens=20, stop_token_ids=(token_at(1, 4),)))
    made.submit(submission(2, prompt_len=4, max_tokens=1))
    made.submit(submission(3, prompt_len=4, max_tokens=1))
    first = made.plan()
    assert made.plan() is not None
    made.finish_step()  # The stop token; the surplus step is in flight.
    second = made.plan()
    assert taken(second) == [2]
    assert second.chunk[0, 0] != first.chunk[0, 0]
    assert made.scheduler.sequences.free == 0
    made.finish_step()
    assert taken(made.plan()) == [3]  # Its last token is planned: 2 needs no more steps.
    made.run()


def test_a_step_has_no_more_sequences_than_it_may() -> None:
    made = group(max_num_seqs=2, num_spare_slots=2)
    for number in (1, 2, 3, 4):
        made.submit(submission(number, prompt_len=4, max_tokens=2))
    plans = [taken(step(made)) for _ in range(4)]
    assert plans == [[1, 2], [], [3, 4], []]
    made.run()


def test_without_lookahead_a_stop_costs_nothing() -> None:
    made = group(lookahead=0)
    made.submit(submission(1, max_tokens=20, stop_token_ids=(token_at(1, 4),)))
    made.run()
    assert made.scheduler.counters.steps == 1


def test_a_stop_token_before_min_tokens_does_not_count() -> None:
    made = group()
    every_token = tuple(range(13))
    made.submit(submission(1, max_tokens=9, min_tokens=6, stop_token_ids=every_token))
    made.submit(submission(2, max_tokens=6, min_tokens=6, stop_token_ids=every_token))
    made.run()
    assert [(stream.end, len(stream.tokens)) for stream in made.streams.values()] == [
        ("stop", 6),
        ("stop", 6),  # stop beats length
    ]


def test_logits_that_are_not_finite_end_one_request_only() -> None:
    made = group()
    for request in (1, 2, 3):
        made.submit(submission(request, max_tokens=6))
    step(made)
    made.worker.poisoned.add(2)
    made.run()
    assert [stream.end for stream in made.streams.values()] == ["length", "failed", "length"]
    made.check_streams()


# ------------------------------------------------------------ too few blocks
def test_the_newest_is_preempted_and_comes_back_first_as_one_prefill() -> None:
    # Each fills 4 blocks of 2 by its end; there are 9 for three of them.
    made = group(block_size=2, num_blocks=9, max_num_seqs=3, lookahead=0)
    for request in (1, 2, 3):
        made.submit(submission(request, prompt_len=2, max_tokens=7))
    made.submit(submission(4, prompt_len=2, max_tokens=1))
    assert taken(step(made)) == [1, 2, 3]
    while made.scheduler.counters.preemptions == 0:
        plan = step(made)
    assert plan.decode.tolist() == [made.worker_slot(1), made.worker_slot(2)]
    before = list(made.streams[3].tokens)
    assert 0 < len(before) < 7
    # Request 4 needs one block only, but it came later.
    while not taken(plan):
        plan = step(made)
    assert taken(plan)[0] == 3
    words = plan.take[0]
    assert (words[TAKE_PROMPT_LEN], words[TAKE_START]) == (2, 0)
    assert plan.chunk[0, 1:].tolist() == [0, 2 + len(before), 1]
    assert plan.chunk_token.tolist()[: 2 + len(before)] == [
        token_at(3, position) for position in range(2 + len(before))
    ]
    made.run()
    made.check_streams()
    assert made.scheduler.counters.prompt_tokens == 8


def test_a_preempted_request_keeps_the_tokens_of_steps_in_flight() -> None:
    made = group(block_size=2, num_blocks=7, max_num_seqs=2)
    made.submit(submission(1, prompt_len=4, max_tokens=9))
    made.submit(submission(2, prompt_len=4, max_tokens=9))
    while made.scheduler.counters.preemptions == 0:
        if made.plan() is None:
            made.finish_step()
    known = len(made.streams[2].tokens)
    assert made.in_flight
    while made.in_flight:
        made.finish_step()
    assert len(made.streams[2].tokens) > known
    made.run()
    made.check_streams()


def test_a_preempted_request_may_end_with_a_step_in_flight() -> None:
    for stop_at in range(4, 12):
        made = group(block_size=2, num_blocks=7, max_num_seqs=2)
        made.submit(submission(1, prompt_len=4, max_tokens=9))
        stop = token_at(2, stop_at)
        made.submit(submission(2, prompt_len=4, max_tokens=9, stop_token_ids=(stop,)))
        made.run()
        made.check_streams()


def test_nobody_is_preempted_for_blocks_that_are_on_their_way() -> None:
    made = group(block_size=2, num_blocks=7)
    made.submit(submission(1, prompt_len=2, max_tokens=9))
    made.submit(submission(2, prompt_len=4, max_tokens=3))
    made.submit(submission(3, prompt_len=2, max_tokens=9))
    assert taken(step(made)) == [1, 2, 3]
    step(made)
    assert made.plan() is not None  # The last step of request 2.
    assert made.scheduler.pool.free == 0
    assert made.plan() is None  # Requests 1 and 3 need a block each.
    assert made.scheduler.counters.preemptions == 0
    made.finish_step()
    assert step(made).decode.size == 2
    made.run()


def test_admission_leaves_a_block_for_each_that_runs() -> None:
    made = group(block_size=4, num_blocks=4)
    made.submit(submission(1, prompt_len=8, max_tokens=2))
    made.submit(submission(2, prompt_len=8, max_tokens=2))
    made.submit(submission(3, prompt_len=1, max_tokens=2))
    assert taken(step(made)) == [1]  # and 3 does not overtake 2, though it would fit
    made.run()
    assert made.admitted == [1, 2, 3]


def test_what_is_alone_gets_all_blocks() -> None:
    made = group(block_size=4, num_blocks=4)
    made.submit(submission(1, prompt_len=10, max_tokens=7))
    made.submit(submission(2, prompt_len=10, max_tokens=7))
    made.run()
    made.check_streams()


def test_what_can_never_fit_is_refused_with_the_arithmetic() -> None:
    made = group(block_size=4, num_blocks=4)
    refused = made.submit(submission(1, prompt_len=10, max_tokens=8))
    assert refused is not None
    assert (refused.request, refused.code) == (1, "too_long")
    assert "10 tokens and max_tokens 8 make 18 tokens" in refused.message
    assert "5 KV blocks of 4 tokens; there are 4 in all" in refused.message
    assert made.scheduler.idle

    made = group(block_size=4, num_blocks=64)
    refused = made.submit(submission(1, prompt_len=60, max_tokens=5))
    assert refused is not None
    assert "make 65 tokens; the limit is 64" in refused.message
    assert made.submit(submission(1, prompt_len=60, max_tokens=4)) is None


@pytest.mark.parametrize(("prompt_len", "max_tokens"), [(0, 1), (1, 0)])
def test_an_empty_request_is_refused(prompt_len: int, max_tokens: int) -> None:
    refused = group().submit(submission(1, prompt_len, max_tokens))
    assert refused is not None
    assert "both have to be at least 1" in refused.message


# ------------------------------------------------------------ giving up
def test_an_abort_frees_at_once_what_no_step_uses() -> None:
    made = group(lookahead=0)
    made.submit(submission(1, max_tokens=9))
    step(made)
    made.abort(1)
    assert made.scheduler.idle
    made.scheduler.check_idle()


@pytest.mark.parametrize("thoroughly", [False, True])
def test_what_is_held_by_nobody_is_told_when_all_have_ended(thoroughly: bool) -> None:
    made = group()
    made.scheduler.pool.take(2)
    with pytest.raises(RuntimeError, match=r"blocks"):
        made.scheduler.check_idle(thoroughly)


def test_an_abort_waits_for_the_steps_in_flight() -> None:
    made = group()
    made.submit(submission(1, max_tokens=9))
    made.plan()
    made.plan()
    made.abort(1)
    assert made.plan() is None
    made.finish_step()
    assert made.scheduler.pool.free < made.limits.num_blocks
    made.finish_step()
    assert made.scheduler.idle
    made.scheduler.check_idle()


def test_an_abort_in_the_queue_or_of_a_stranger() -> None:
    made = group(max_num_seqs=1)
    made.submit(submission(1, max_tokens=3))
    made.submit(submission(2, max_tokens=3))
    step(made)
    made.abort(2)
    assert made.scheduler.waiting == 0
    assert not made.scheduler.abort(2)
    assert not made.scheduler.abort(77)
    made.run()


def test_a_reset_gives_up_everything() -> None:
    made = group(max_num_seqs=2)
    for request in (1, 2, 3):
        made.submit(submission(request, max_tokens=9))
    made.plan()
    made.reset()
    assert (made.scheduler.running, made.scheduler.waiting) == (0, 0)
    made.run()
    assert made.scheduler.counters.finished == 3
    made.submit(submission(1, max_tokens=2, seed=5))  # The new router counts from the start.
    made.run()


# ------------------------------------------------------------ broken promises
def test_a_request_twice_is_a_fault() -> None:
    made = group()
    made.submit(submission(1))
    with pytest.raises(ValueError, match="request 1 is submitted twice"):
        made.scheduler.submit(submission(1))


def test_a_result_out_of_order_is_a_fault() -> None:
    made = group()
    rows = np.array([[1, 1, 5]], dtype=np.int32)
    with pytest.raises(ValueError, match="a result of step 1 has come; expected: None"):
        made.scheduler.apply(1, rows)
    made.submit(submission(1))
    made.plan()
    with pytest.raises(ValueError, match="a result of step 2 has come; expected: 1"):
        made.scheduler.apply(2, rows)


def test_a_result_with_other_rows_is_a_fault() -> None:
    made = group()
    made.submit(submission(1))
    made.plan()
    with pytest.raises(ValueError, match=r"planned for requests \[1\]; its result names \[4\]"):
        made.scheduler.apply(1, np.array([[4, 1, 5]], dtype=np.int32))


def test_many_stop_ids_of_one_request_are_not_anothers() -> None:
    made = group(max_num_seqs=2)
    made.submit(submission(1, max_tokens=1, stop_token_ids=tuple(range(13))))
    made.submit(submission(2, max_tokens=8))
    made.submit(submission(3, max_tokens=8))
    made.run()
    assert [stream.end for stream in made.streams.values()] == ["stop", "length", "length"]
