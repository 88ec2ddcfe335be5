"""The scheduler under anything that can happen, in any order; see fake_group.py for the checks."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from albireo.ipc.messages import Submit
from albireo.ipc.stopping import end_of_tokens
from albireo.scheduler.limits import Limits

from .fake_group import FakeGroup
from .submissions import VOCAB_SIZE, expected_end, submission

SETTINGS = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

STOP_IDS = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2, unique=True).map(tuple)
SHAPES = st.fixed_dictionaries(
    {
        "prompt_len": st.integers(1, 20),
        "max_tokens": st.integers(1, 20),
        "min_tokens": st.integers(0, 6),
        "stop_token_ids": STOP_IDS,
        # Few seeds: sequences that are equal, or share their first 5 or 12 tokens.
        "seed": st.sampled_from([1, 2, 5001, 5002, 12001, 12002]),
        "cache_salt": st.sampled_from(["", "", "", "other"]),
        "priority": st.sampled_from([0, 0, 0, -1, 3]),
        "tenant": st.sampled_from(["a", "a", "b", "c"]),  # WEIGHTS has what each weighs
        "resumed": st.sampled_from([0, 0, 0, 1, 4]),
        "prompt_logprobs": st.sampled_from([-1, -1, -1, 2]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.5]),
        "logit_bias": st.sampled_from([{}, {}, {3: 1.5, 7: -2.0}]),
    }
)
WEIGHTS = {"a": 1.0, "b": 3.5, "c": 0.25}
Shape = dict[str, Any]


@st.composite
def tiny_limits(draw: st.DrawFn, lookahead: int) -> Limits:
    """Budgets that hold one long request, and hardly more."""
    block_size = draw(st.integers(1, 5))
    max_model_len = draw(st.integers(8, 40))
    return Limits(
        max_num_seqs=draw(st.integers(1, 6)),
        num_spare_slots=draw(st.integers(0, 3)),
        max_num_batched_tokens=draw(st.integers(1, 24) | st.integers(25, 64)),
        max_model_len=max_model_len,
        block_size=block_size,
        num_blocks=max(1, max_model_len // block_size + draw(st.integers(-2, 6))),
        lookahead=lookahead,
        prefix_caching=draw(st.booleans()),
        num_swap_blocks=draw(st.sampled_from([0, 2, 20])),
        itl_target_ms=draw(st.sampled_from([0.0, 0.001])),
        mixed_step_tokens=draw(st.sampled_from([0, 8, 16, 48])),
    )


def shaped(request: int, shape: Shape) -> Submit:
    """A submission from one of SHAPES."""
    shape = dict(shape, weight=WEIGHTS[shape["tenant"]])
    shape["min_tokens"] = min(shape["min_tokens"], shape["max_tokens"])
    shape["resumed"] = min(shape["resumed"], shape["max_tokens"] - 1)
    submit = submission(request, **shape)
    if _stopped_before(submit):
        submit = submission(request, **(shape | {"resumed": 0}))
    return submit


def _stopped_before(submit: Submit) -> bool:
    """Whether the answer ends within the tokens that it is resumed with."""
    given = submit.prompt_ids[len(submit.prompt_ids) - submit.resumed :] if submit.resumed else []
    return any(
        end_of_tokens(
            token, count, submit.min_tokens, submit.max_tokens, frozenset(submit.stop_token_ids)
        )
        for count, token in enumerate(given, 1)
    )


class Group(RuleBasedStateMachine):
    """Clients, a slow worker and a detokenizer, all against one scheduler."""

    lookahead = 1

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        self.group = FakeGroup(data.draw(tiny_limits(self.lookahead)))
        self.requests = 0

    @rule(shapes=st.lists(SHAPES, min_size=1, max_size=6))
    def submit(self, shapes: list[Shape]) -> None:
        limits = self.group.limits
        for shape in shapes:
            self.requests += 1
            refused = self.group.submit(shaped(self.requests, shape))
            total = shape["prompt_len"] + shape["max_tokens"]
            blocks = -(-(total - 1) // limits.block_size)
            fits = total <= limits.max_model_len and blocks <= limits.num_blocks
            assert (refused is None) == fits

    @precondition(lambda self: self.group.unfinished())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.group.abort(data.draw(st.sampled_from(self.group.unfinished())))

    @precondition(lambda self: self.group.unfinished())
    @rule(data=st.data())
    def poison(self, data: st.DataObject) -> None:
        """From now on a request's logits are not finite."""
        self.group.worker.poisoned.add(data.draw(st.sampled_from(self.group.unfinished())))

    @rule()
    def plan(self) -> None:
        self.group.plan()

    @rule(steps=st.integers(1, 20))
    def work(self, steps: int) -> None:
        """As the process does it: plan all that can be planned, then a result comes."""
        for _ in range(steps):
            while self.group.plan() is not None:
                pass
            if self.group.in_flight:
                self.group.finish_step()

    @precondition(lambda self: self.group.in_flight)
    @rule()
    def finish_step(self) -> None:
        self.group.finish_step()

    @precondition(lambda self: self.requests > 12)
    @rule()
    def reset(self) -> None:
        self.group.reset()

    @invariant()
    def consistent(self) -> None:
        group = self.group
        group.scheduler.check_idle()
        assert group.scheduler.running + group.scheduler.waiting == len(group.unfinished())
        group.check_order()
        group.check_waiting_tokens()

    def teardown(self) -> None:
        if not hasattr(self, "group"):
            return
        self.group.run()
        self.group.check_streams()
        counters = self.group.scheduler.counters
        streams = self.group.streams.values()
        assert counters.finished == len(streams)
        assert counters.generated_tokens == sum(len(stream.tokens) for stream in streams)


class GroupWithoutLookahead(Group):
    lookahead = 0


class GroupOfShortSteps(Group):
    lookahead = 2


@pytest.mark.parametrize("machine", [Group, GroupWithoutLookahead, GroupOfShortSteps])
def test_whatever_happens_every_request_ends_once_and_nothing_leaks(machine) -> None:
    run_state_machine_as_test(
        machine, settings=settings(SETTINGS, max_examples=60, stateful_step_count=40)
    )


@settings(SETTINGS, max_examples=120)
@given(
    data=st.data(), lookahead=st.integers(0, 2), shapes=st.lists(SHAPES, min_size=3, max_size=16)
)
def test_pressure_and_lookahead_do_not_change_tokens(
    data: st.DataObject, lookahead: int, shapes: list[Shape]
) -> None:
    limits = data.draw(tiny_limits(lookahead))
    pressed = FakeGroup(limits)
    at_ease = FakeGroup(
        replace(
            limits, max_num_seqs=16, max_num_batched_tokens=1024, num_blocks=1024, lookahead=0,
            prefix_caching=False, itl_target_ms=0.0, mixed_step_tokens=0,
        )
    )  # fmt: skip
    for number, shape in enumerate(shapes, 1):
        submit = shaped(number, shape)
        if pressed.submit(submit) is None:
            assert at_ease.submit(submit) is None
    pressed.run()
    at_ease.run()
    assert at_ease.scheduler.counters.preemptions == 0
    for number, stream in pressed.streams.items():
        assert (stream.end, stream.tokens) == expected_end(stream.submit)
        assert at_ease.streams[number] == stream


@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_soak(seed: int, lookahead: int) -> None:
    """Long runs near the limit of memory: hundreds of preemptions, aborts under way."""
    rng = random.Random(seed)
    group = FakeGroup(
        Limits(
            max_num_seqs=8,
            max_num_batched_tokens=rng.randint(6, 40),
            max_model_len=64,
            block_size=2,
            num_blocks=rng.randint(32, 48),
            lookahead=lookahead,
            prefix_caching=seed % 2 == 0,
            num_swap_blocks=[0, 8, 64][seed % 3],
        )
    )
    for number in range(1, 121):
        stops = tuple(rng.sample(range(VOCAB_SIZE), rng.randint(0, 1)))
        shape = {
            "prompt_len": rng.randint(1, 14),
            "max_tokens": rng.randint(1, 50),
            "min_tokens": rng.randint(0, 50),
            "stop_token_ids": stops,
            "seed": rng.choice([6001, 6002, 9001]) + number % 3,
            "resumed": 0,
            "priority": rng.choice([0, 0, 1]),
            "tenant": rng.choice("ab"),
            "frequency_penalty": rng.choice([0.0, 0.5]),
        }
        assert group.submit(shaped(number, shape)) is None
        for _ in range(rng.randint(0, 6)):
            while group.plan() is not None:
                pass
            if group.in_flight:
                group.finish_step()
        if rng.random() < 0.1 and group.unfinished():
            group.abort(rng.choice(group.unfinished()))
    group.run()
    group.check_streams()
    assert group.scheduler.counters.preemptions > 20
