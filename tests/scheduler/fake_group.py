"""A group without processes: the real Scheduler, a naive worker, a naive detokenizer.

Plans and results pass through frames in their real layout.  The worker
(fake_worker.py) checks what it is told to compute; the group checks budgets,
reuse of blocks and slots under steps in flight, and that each request ends
once, with the tokens it should have, and in its turn.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

import numpy as np

from albireo.ipc.messages import Refused, Submit
from albireo.ipc.plan import (
    COPY_IN,
    COPY_OUT,
    MAX_PLAN_COPIES,
    MAX_PLAN_EDITS,
    MAX_PLAN_SCORES,
    TAKE_PROMPT_LEN,
    TAKE_REQUEST,
    TAKE_SLOT,
    TAKE_UNTIL,
    PlanView,
    ResultView,
    max_appends,
    plan_bytes,
    result_bytes,
    write_plan,
    write_result,
)
from albireo.ipc.stopping import end_of_tokens
from albireo.scheduler.limits import Limits
from albireo.scheduler.scheduler import Scheduler

from .fake_worker import FakeWorker
from .submissions import expected_edits, expected_end


@dataclass
class Stream:
    """What the detokenizer has of a request."""

    submit: Submit
    tokens: list[int] = field(default_factory=list)
    end: str | None = None


@dataclass
class Step:
    """A step in flight: its result, the slots that it names, and who uses which blocks.

    users: block -> takes of the slots that have it.  copied: device blocks that
    it copies from.  host: host blocks that it copies from or to.
    """

    result: memoryview
    slots: set[int]
    users: dict[int, set[int]]
    copied: set[int]
    host: set[int]


class FakeGroup:
    """Scheduler, worker and detokenizer.  A test calls submit, abort, plan, finish_step, run.

    step_us: what the worker says a step of so many tokens takes.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self.worker = FakeWorker(limits.block_size)
        self.streams: dict[int, Stream] = {}
        self.admitted: list[int] = []
        self.in_flight: deque[Step] = deque()
        self.step_us = lambda tokens: 5
        self._frame = memoryview(
            bytearray(
                plan_bytes(
                    limits.max_num_seqs, limits.max_num_batched_tokens, limits.block_size,
                    limits.max_model_len,
                )
            )
        )  # fmt: skip

    def submit(self, submit: Submit) -> Refused | None:
        refused = self.scheduler.submit(submit)
        if refused is None:
            self.streams[submit.request] = Stream(submit)
        return refused

    def abort(self, request: int) -> None:
        self.scheduler.abort(request)
        if self.streams[request].end is None:
            self.streams[request].end = "aborted"

    def reset(self) -> None:
        self.scheduler.reset()
        for stream in self.streams.values():
            stream.end = stream.end or "aborted"

    def worker_slot(self, request: int) -> int:
        """The slot that a running request holds."""
        return next(slot for slot, state in self.worker.slots.items() if state.request == request)

    def unfinished(self) -> list[int]:
        return [request for request, stream in self.streams.items() if stream.end is None]

    def plan(self) -> PlanView | None:
        """The next plan, carried out; its result waits for finish_step."""
        plan = self.scheduler.plan()
        if plan is None:
            return None
        nbytes = write_plan(self._frame, plan.step, 0, plan.sections)
        view = PlanView(memoryview(bytes(self._frame[:nbytes])))
        self._check_plan(view)
        rows = self.worker.step(view)
        assert rows[:, 0].tolist() == plan.sampled.tolist()
        result = memoryview(bytearray(result_bytes(self.limits.max_num_seqs)))
        tokens = len(view.chunk_token) + len(view.decode)
        write_result(result, view.step, rows, self.step_us(tokens), 4)
        self._check_progress(view)
        slots = set(self._named(view))
        users: dict[int, set[int]] = defaultdict(set)
        for slot in slots:
            for block in self.worker.slots[slot].table.values():
                users[block].add(self.worker.slots[slot].take)
        device, host = self._copied(view)
        self.in_flight.append(Step(result, slots, users, device, host))
        self._check_writes(view)
        assert len(self.in_flight) <= self.limits.lookahead + 1
        return view

    def finish_step(self) -> None:
        """The result of the oldest step in flight comes."""
        result = ResultView(self.in_flight.popleft().result)
        ended = self._detokenize(result.rows)
        told = {end.request: (end.reason, end.generated) for end in self.scheduler.apply(
            result.step, result.rows, result.step_us)}  # fmt: skip
        assert told == ended
        self.scheduler.memory.check()

    def run(self) -> None:
        """Goes on until nothing is left, and checks that nothing is."""
        steps = 0
        while not self.scheduler.idle:
            while self.plan() is not None:
                steps += 1
            assert self.in_flight, "requests are left, but no step is planned"
            self.finish_step()
            assert steps < 3_000, "the requests do not come to an end"
        assert not self.in_flight
        assert self.unfinished() == []
        self.scheduler.check_idle()
        self.check_order()

    def check_streams(self) -> None:
        """Every request that was left alone has exactly the tokens and scores it should have."""
        for request, stream in self.streams.items():
            submit = stream.submit
            reason, tokens = expected_end(submit)
            scored = self.worker.scored[request]
            wanted = list(range(1, len(submit.prompt_ids) - submit.resumed))
            if submit.prompt_logprobs < 0:
                wanted = []
            if stream.end in ("stop", "length"):
                assert (stream.end, stream.tokens) == (reason, tokens)
                assert scored == wanted
            else:
                assert stream.tokens == tokens[: len(stream.tokens)]
                assert scored == wanted[: len(scored)]

    def check_order(self) -> None:
        """Requests of one priority and tenant got their first slot in the order they came in."""
        shares = defaultdict(list)
        for request in self.admitted:
            submit = self.streams[request].submit
            shares[submit.priority, submit.tenant].append(request)
        for order in shares.values():
            assert order == sorted(order), "not first come, first served"

    def _named(self, plan: PlanView) -> list[int]:
        return plan.chunk[:, 0].tolist() + plan.decode.tolist()

    def _check_plan(self, plan: PlanView) -> None:
        limits = self.limits
        named = self._named(plan)
        assert named, f"step {plan.step} does nothing"
        assert len(set(named)) == len(named) <= limits.max_num_seqs
        assert len(plan.decode) + len(plan.chunk_token) <= limits.max_num_batched_tokens
        assert int(plan.chunk[:, 2].sum()) == len(plan.chunk_token)
        assert len(plan.append) <= max_appends(
            limits.max_num_seqs, limits.max_num_batched_tokens, limits.block_size,
            limits.max_model_len,
        )  # fmt: skip
        assert len(plan.edit) <= MAX_PLAN_EDITS
        assert len(plan.history_token) <= limits.max_model_len
        assert len(plan.score) <= MAX_PLAN_SCORES
        assert len(plan.copy) <= MAX_PLAN_COPIES
        taken = set(plan.take[:, TAKE_SLOT].tolist())
        for step in self.in_flight:
            assert not taken & step.slots, "a slot is reused under a step in flight"

    def _copied(self, plan: PlanView) -> tuple[set[int], set[int]]:
        """(device blocks that the plan copies from, host blocks that it copies from or to).

        What is copied to is nothing else's target or source in the plan.
        """
        sources = Counter[tuple[bool, int]]()
        targets = Counter[tuple[bool, int]]()
        for kind, source, target in plan.copy.tolist():
            sources[kind == COPY_IN, source] += 1
            targets[kind == COPY_OUT, target] += 1
        assert not sources.keys() & targets.keys()
        assert max(targets.values(), default=1) == 1
        host = {block for is_host, block in sources.keys() | targets.keys() if is_host}
        assert all(0 <= block < self.limits.num_swap_blocks for block in host)
        return {block for is_host, block in sources if not is_host}, host

    def _check_writes(self, plan: PlanView) -> None:
        """What a plan writes is nobody else's, in this step and in those in flight."""
        *earlier, this = self.in_flight
        size, writes = self.limits.block_size, []
        for slot, start, length, _ in plan.chunk.tolist():
            writes += [(slot, at // size) for at in range(start, start + length)]
        writes += [(slot, (self.worker.slots[slot].position - 1) // size) for slot in plan.decode]
        for slot, index in writes:
            state = self.worker.slots[int(slot)]
            block = state.table[index]
            for step in self.in_flight:
                assert step.users.get(block, {state.take}) == {state.take}, f"{block} is in use"
            for step in earlier:
                assert block not in step.copied, f"block {block} is being copied"
        for step in earlier:
            assert not step.host & this.host, "a host block is reused under a copy"
            targets = {target for kind, _, target in plan.copy.tolist() if kind != COPY_OUT}
            assert not targets & (step.copied | set(step.users)), "a copy hits a block in use"

    def _check_progress(self, plan: PlanView) -> None:
        """Nobody is computed past its end; every take says what it should."""
        for words in plan.take:
            request = int(words[TAKE_REQUEST])
            if request not in self.admitted:
                self.admitted.append(request)
            submit = self.streams[request].submit
            self._check_turn(request, submit)
            assert words[TAKE_PROMPT_LEN] == len(submit.prompt_ids) - submit.resumed
            assert words[TAKE_UNTIL] == words[TAKE_PROMPT_LEN] + submit.min_tokens
            edited = self.worker.slots[int(words[TAKE_SLOT])].edited
            assert sorted(edited) == sorted(expected_edits(submit))
        for slot in self._named(plan):
            state = self.worker.slots[slot]
            submit = self.streams[state.request].submit
            assert state.position < len(submit.prompt_ids) - submit.resumed + submit.max_tokens

    def check_waiting_tokens(self) -> None:
        """The queue knows how long the prompts are of all that have no running slot."""
        state = self.scheduler._state
        running = set(state.sequences.request[state.running].tolist())
        waiting = [each for number, each in state.requests.items() if number not in running]
        assert state.queue.prompt_tokens == sum(each.prompt_len for each in waiting)

    def _check_turn(self, request: int, submit: Submit) -> None:
        """Who had a slot before comes back before anybody newer of its priority and tenant."""
        scheduler = self.scheduler
        running = set(scheduler.sequences.request[scheduler._state.running].tolist())
        for other in self.admitted:
            stream = self.streams[other]
            same = (stream.submit.priority, stream.submit.tenant) == (
                submit.priority, submit.tenant,
            )  # fmt: skip
            if same and stream.end is None and other not in running:
                assert request < other, f"{request} got a slot while {other} was preempted"

    def _detokenize(self, rows: np.ndarray) -> dict[int, tuple[str, int]]:
        """Feeds the rows to their streams; those that end: (reason, generated tokens)."""
        ended = {}
        for request, count, token in rows.tolist():
            stream = self.streams[request]
            if stream.end is not None:
                continue
            submit = stream.submit
            if count == 0:
                stream.end = "failed"
            else:
                stream.tokens.append(token)
                stream.end = end_of_tokens(
                    token,
                    submit.resumed + len(stream.tokens),
                    submit.min_tokens,
                    submit.max_tokens,
                    frozenset(submit.stop_token_ids),
                )
            if stream.end is not None:
                ended[request] = (stream.end, submit.resumed + len(stream.tokens))
        return ended
