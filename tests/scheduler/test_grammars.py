"""A grammar's way through plans: with each take, never two large ones at once, and its end."""

from __future__ import annotations

import numpy as np

from albireo.ipc.grammars import MAX_GRAMMAR_BYTES
from albireo.ipc.plan import ROW_GRAMMAR_END, TAKE_FLAGS, TAKE_GRAMMAR, PlanView
from albireo.scheduler.scheduler import Ended

from .groups import group
from .submissions import submission
from .test_pressure import until_taken


def grammars_of(plan: PlanView) -> dict[int, bytes]:
    found, at = {}, 0
    for slot, size in plan.grammar.tolist():
        words = -(-size // 4)
        found[slot] = plan.grammar_word[at : at + words].tobytes()[:size]
        at += words
    return found


def test_a_grammar_comes_with_its_take() -> None:
    made = group(max_num_seqs=3)
    for request, text in ((1, "start: /é/"), (2, ""), (3, "x" * 33)):
        made.submit(submission(request, prompt_len=4, max_tokens=3, grammar=text))
    plan = made.plan()
    assert plan is not None
    flags = [bool(word & TAKE_GRAMMAR) for word in plan.take[:, TAKE_FLAGS].tolist()]
    assert flags == [True, False, True]
    slots = plan.take[:, 0].tolist()
    assert grammars_of(plan) == {slots[0]: "start: /é/".encode(), slots[2]: b"x" * 33}
    made.run()
    made.check_streams()


def test_one_plan_has_room_for_one_of_the_largest() -> None:
    made = group(max_num_seqs=4)
    for request in (1, 2):
        text = "x" * (MAX_GRAMMAR_BYTES - request)
        made.submit(submission(request, prompt_len=4, max_tokens=6, grammar=text))
    first, second = made.plan(), made.plan()
    assert first is not None and second is not None
    assert [len(first.take), len(second.take)] == [1, 1]
    made.run()
    made.check_streams()


def test_it_comes_again_with_all_tokens_after_a_preemption() -> None:
    made = group(block_size=2, num_blocks=7, max_num_seqs=2, num_swap_blocks=8)
    for request in (1, 2):
        made.submit(submission(request, prompt_len=4, max_tokens=9, grammar=f"start: /{request}/"))
    while made.scheduler.counters.preemptions == 0:
        if made.plan() is None:
            made.finish_step()
    plan = until_taken(made, 2)
    assert list(grammars_of(plan).values()) == [b"start: /2/"]
    told = plan.history[:, 2].sum() + plan.chunk[plan.chunk[:, 0] == plan.take[0, 0], 2].sum()
    request = made.scheduler._state.requests[2]
    assert plan.history[:, 2].tolist() != [0]
    assert told == len(request.tokens)
    made.run()
    made.check_streams()


def test_a_grammar_that_can_only_stop_ends_the_request() -> None:
    made = group(max_num_seqs=2)
    made.submit(submission(1, prompt_len=4, max_tokens=9, grammar="start: /a/"))
    scheduler = made.scheduler
    plan = scheduler.plan()
    assert plan is not None
    rows = np.array([[1, 1, 5]], np.int32)
    assert scheduler.apply(plan.step, rows) == []
    plan = scheduler.plan()
    assert plan is not None
    ended = scheduler.apply(plan.step, np.array([[1, 0, ROW_GRAMMAR_END]], np.int32))
    assert ended == [Ended(1, "stop", 1)]
    assert scheduler.idle
    scheduler.check_idle()
