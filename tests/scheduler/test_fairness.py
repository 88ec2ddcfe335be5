"""Whose turn it is: priorities with aging, tenants in turn, first come first served."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from albireo.scheduler.requests import AGING_STEPS, Request, new_request
from albireo.scheduler.waiting import WaitingQueue

from .fake_group import FakeGroup
from .groups import group, step, taken
from .submissions import submission


class Queue:
    """A WaitingQueue, and requests for it."""

    def __init__(self) -> None:
        self.queue = WaitingQueue()
        self.arrivals = 0

    def add(
        self, tenant: str = "", priority: int = 0, at_step: int = 0, prompt_len: int = 4,
        weight: float = 1.0,
    ) -> Request:  # fmt: skip
        self.arrivals += 1
        submit = submission(
            self.arrivals, prompt_len, tenant=tenant, priority=priority, weight=weight
        )
        request = new_request(submit, self.arrivals, at_step)
        self.queue.add(request)
        return request

    def take(self) -> Request:
        request = self.queue.head()
        assert request is not None
        assert self.queue.head() is request
        self.queue.take(request, len(request.tokens))
        return request

    def take_all(self) -> list[Request]:
        return [self.take() for _ in range(len(self.queue))]


def test_first_come_first_served() -> None:
    queue = Queue()
    assert queue.queue.head() is None
    requests = [queue.add() for _ in range(5)]
    assert queue.take_all() == requests


def test_the_lower_number_goes_first_until_the_higher_has_waited_long() -> None:
    queue = Queue()
    low = queue.add(priority=2, at_step=0)
    before = [queue.add(priority=1, at_step=AGING_STEPS - 1) for _ in range(2)]
    urgent = queue.add(priority=-1, at_step=3 * AGING_STEPS - 1)
    late = [queue.add(priority=1, at_step=AGING_STEPS + 1) for _ in range(2)]
    assert queue.queue.by_priority() == {-1: 1, 1: 4, 2: 1}
    assert queue.take_all() == [urgent, *before, low, *late]


def test_tenants_get_tokens_in_turn_not_requests() -> None:
    queue = Queue()
    for _ in range(10):
        queue.add("long", prompt_len=30)
    for _ in range(30):
        queue.add("short", prompt_len=10)
    served = [request.tenant for request in queue.take_all()]
    for count in range(4, 40, 4):
        tokens = 30 * served[:count].count("long"), 10 * served[:count].count("short")
        assert abs(tokens[0] - tokens[1]) <= 30 + 10


def test_generated_tokens_count_too() -> None:
    queue = Queue()
    writer = [queue.add("writer") for _ in range(3)]
    reader = [queue.add("reader") for _ in range(3)]
    assert queue.take() is writer[0]
    queue.queue.charge(writer[0].share, 8)
    assert queue.take_all() == [*reader, *writer[1:]]


def test_tenants_get_tokens_by_their_weights() -> None:
    queue = Queue()
    weights = {"half": 0.5, "one": 1.0, "four": 4.0}
    for name, weight in weights.items():
        for _ in range(200):
            queue.add(name, prompt_len=10, weight=weight)
    served = [request.tenant for request in (queue.take() for _ in range(220))]
    for count in range(22, 221, 22):
        for name, weight in weights.items():
            fair = count * weight / sum(weights.values())
            assert abs(served[:count].count(name) - fair) <= 1.5


def test_a_heavy_newcomer_does_not_get_the_turns_it_missed_either() -> None:
    queue = Queue()
    for _ in range(60):
        queue.add("flood")
    for _ in range(30):
        queue.take()
    for _ in range(30):
        queue.add("heavy", weight=3.0)
    tenants = [request.tenant for request in (queue.take() for _ in range(32))]
    for count in range(4, 33, 4):
        assert abs(tenants[:count].count("heavy") - 0.75 * count) <= 2


def test_who_comes_late_gets_a_turn_but_not_the_turns_it_missed() -> None:
    queue = Queue()
    flood = [queue.add("flood") for _ in range(20)]
    for _ in range(10):
        queue.take()
    late = [queue.add("late") for _ in range(4)]
    tenants = [request.tenant for request in (queue.take() for _ in range(8))]
    assert sorted(tenants) == ["flood"] * 4 + ["late"] * 4
    assert all(len({*pair}) == 2 for pair in pairwise(tenants))
    assert queue.take_all() == flood[14:]
    assert late[0].number > flood[-1].number


def test_no_number_of_newcomers_keeps_who_has_generated_waiting() -> None:
    queue = Queue()
    old = [queue.add("old") for _ in range(2)]
    newcomers = [queue.add(f"new {number}") for number in range(4)]
    assert queue.take() is old[0]
    queue.queue.charge(old[0].share, 96)
    while (request := queue.take()) is not old[1]:
        queue.queue.charge(request.share, 96)
        newcomers.append(queue.add(f"new {len(newcomers)}"))
        # Four of them wait, besides.  Those who were there at its last turn come first.
        assert len(newcomers) <= 4 + 2 * (1 + 4)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_preempted_requests_come_first_of_their_tenant_by_age(order: tuple[int, ...]) -> None:
    queue = Queue()
    running = [queue.add("a") for _ in range(3)]
    waiting = queue.add("a")
    for request in running:
        assert queue.take() is request
        request.preemptions = 1
    other, urgent = queue.add("b"), queue.add("b", priority=-1)
    for index in order:
        queue.queue.put_back(running[index])
    # The turn of b comes before that of a, who has had three.
    assert queue.take_all() == [urgent, other, *running, waiting]


def test_a_request_can_be_taken_out_wherever_it_stands() -> None:
    rng = random.Random(1)
    queue, waiting = Queue(), []
    for _ in range(2000):
        choice = rng.random()
        if choice < 0.45:
            waiting.append(queue.add(rng.choice("abcdef") * rng.randint(1, 9), rng.randint(0, 2)))
        elif choice < 0.7 and waiting:
            request = queue.take()
            waiting.remove(request)
            if choice < 0.6:
                request.preemptions += 1
                queue.queue.put_back(request)
                waiting.append(request)
        elif waiting:
            queue.queue.remove(waiting.pop(rng.randrange(len(waiting))))
        assert len(queue.queue) == len(waiting)
    assert {request.number for request in queue.take_all()} == {r.number for r in waiting}
    assert queue.queue.by_priority() == {}


def test_what_is_known_of_past_tenants_is_bounded() -> None:
    queue = Queue()
    queue.add("stays", priority=0)
    queue.add("stays", priority=0)
    for number in range(3000):
        queue.add(f"tenant {number}")
        queue.take()
    (priority,) = queue.queue._priorities.values()
    assert len(priority._tenants) < 300
    assert len(priority._by_tag) < 300


# ------------------------------------------------------------ with a scheduler
def steps_to_first_token(made: FakeGroup, request: int) -> int:
    steps = 0
    while not made.streams[request].tokens:
        while made.plan() is not None:
            pass
        made.finish_step()
        steps += 1
    return steps


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_flood_does_not_keep_another_tenant_waiting(prefix_caching: bool) -> None:
    made = group(
        max_num_seqs=8, num_blocks=128, max_num_batched_tokens=32, prefix_caching=prefix_caching
    )
    quiet = submission(1, tenant="quiet")
    made.submit(quiet)
    alone = steps_to_first_token(made, 1)
    made.run()
    for request in range(2, 200):
        made.submit(submission(request, max_tokens=30, tenant="flood"))
    waits = []
    for request in range(200, 205):
        for _ in range(20):
            while made.plan() is not None:
                pass
            made.finish_step()
        made.submit(submission(request, tenant="quiet"))
        waits.append(steps_to_first_token(made, request))
    assert max(waits) <= 3 * (alone + made.limits.lookahead + 1)
    made.run()
    made.check_streams()


def test_what_the_prefix_cache_has_costs_no_turns() -> None:
    made = group(max_num_seqs=1, prefix_caching=True)
    made.submit(submission(1, prompt_len=44, max_tokens=1, seed=40_001, tenant="common"))
    made.run()
    for request in range(2, 42):
        tenant, prompt_len, shared = [("own", 4, 0), ("common", 44, 40_000)][request % 2]
        seed = shared + request
        made.submit(submission(request, prompt_len, max_tokens=1, seed=seed, tenant=tenant))
    made.run()
    served = [made.streams[request].submit.tenant for request in made.admitted[1:]]
    for count in range(2, 33, 2):  # Of each at most 4 tokens are computed, and 16 charged at once.
        assert abs(served[:count].count("own") - count // 2) <= 4
    made.check_streams()


def test_a_step_that_is_asked_for_again_is_paid_once() -> None:
    """While nothing can be planned, every message to the scheduler has it try once more."""
    made = group(num_blocks=8)
    made.submit(submission(1, max_tokens=15, tenant="runs"))
    made.submit(submission(2, prompt_len=28, tenant="waits"))
    made.submit(submission(3, tenant="runs"))
    while made.scheduler.next_step < 16:
        made.plan()
        if len(made.in_flight) > 1:
            made.finish_step()
    (priority,) = made.scheduler._state.queue._priorities.values()
    paid = []
    for _ in range(3):
        assert made.plan() is None
        paid.append(priority._tenants["runs"].tag)
    assert paid[0] > 0 and len({*paid}) == 1
    made.run()
    made.check_streams()


def test_a_flood_fills_what_nobody_else_wants() -> None:
    made = group(max_num_seqs=4)
    for request in range(1, 9):
        made.submit(submission(request, max_tokens=20, tenant="flood"))
    assert taken(step(made)) == [1, 2, 3, 4]
    for request in (9, 10, 11):
        made.submit(submission(request, max_tokens=20, tenant="other"))
    for _ in range(12):
        step(made)
    running = made.scheduler.sequences.request[made.scheduler._state.running].tolist()
    # Its next turn is after the one of 4, which had to go but has paid for its place.
    assert sorted(running) == [1, 2, 3, 9]
    assert made.scheduler.counters.preemptions == 1
    made.run()
    made.check_streams()


def running_tenants(made: FakeGroup) -> list[str]:
    numbers = made.scheduler.sequences.request[made.scheduler._state.running].tolist()
    return [made.streams[number].submit.tenant for number in numbers]


@pytest.mark.parametrize(("weight", "places"), [(1.0, 4), (3.0, 6), (7.0, 7), (0.34, 2)])
def test_places_are_shared_by_weight_too(weight: float, places: int) -> None:
    made = group(max_num_seqs=8, num_blocks=400, max_model_len=128)
    for request in range(1, 17):
        made.submit(submission(request, max_tokens=80, tenant="flood"))
    assert len(taken(step(made))) == 8
    for request in range(17, 33):
        made.submit(submission(request, max_tokens=80, tenant="other", weight=weight))
    for _ in range(32):
        step(made)
    for _ in range(24):  # Nobody changes places for nothing.
        assert running_tenants(made).count("other") == places
        step(made)
    assert made.scheduler.counters.preemptions == places
    for request in range(1, 33):
        made.abort(request)
    made.run()


def test_an_urgent_request_takes_the_place_of_the_least_important() -> None:
    made = group(max_num_seqs=2)
    made.submit(submission(1, max_tokens=20, priority=1))
    made.submit(submission(2, max_tokens=20, priority=2))
    step(made)
    made.submit(submission(3, max_tokens=4, priority=2))
    made.submit(submission(4, max_tokens=4, priority=0))
    assert steps_to_first_token(made, 4) <= 3
    assert made.scheduler.waiting_by_priority == {2: 2}
    made.run()
    assert made.admitted == [1, 2, 4, 3]
    made.check_streams()


def test_an_urgent_request_takes_as_many_blocks_as_it_needs_or_none() -> None:
    made = group(max_num_seqs=4, num_blocks=12)
    made.submit(submission(1, prompt_len=8, max_tokens=12, priority=0))
    made.submit(submission(2, prompt_len=8, max_tokens=12, priority=1))
    made.submit(submission(3, prompt_len=8, max_tokens=12, priority=1))
    step(made)
    made.submit(submission(4, prompt_len=16, max_tokens=2, priority=0))
    steps_to_first_token(made, 4)
    assert made.scheduler.waiting_by_priority == {1: 1}
    made.run()
    made.check_streams()

    made = group(max_num_seqs=4, num_blocks=8)
    made.submit(submission(1, prompt_len=16, max_tokens=12, priority=0))
    made.submit(submission(2, prompt_len=4, max_tokens=3, priority=1))
    step(made)
    made.submit(submission(3, prompt_len=28, max_tokens=2, priority=0))
    assert steps_to_first_token(made, 2) >= 0
    made.run()
    assert made.scheduler.counters.preemptions == 0


def test_priorities_of_any_size_are_numbers_like_others() -> None:
    made = group(max_num_seqs=1)
    made.submit(submission(1, priority=2**62))
    step(made)
    made.submit(submission(2, priority=-(2**62)))
    made.run()
    assert made.scheduler.counters.finished == 2
