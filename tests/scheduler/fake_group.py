"""A group without processes: the real Scheduler, a naive worker, a naive detokenizer.

Plans and results pass through frames in their real layout.  The worker keeps
per position who wrote which token there, and refuses to attend to anything
else; the group checks budgets, reuse of blocks and slots under steps in
flight, and that each request ends once, with the tokens it should have.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from albireo.ipc.messages import Refused, Submit
from albireo.ipc.plan import (
    ROW_WORDS,
    TAKE_PROMPT_LEN,
    TAKE_REQUEST,
    TAKE_SEED_LO,
    TAKE_SLOT,
    TAKE_START,
    PlanView,
    ResultView,
    plan_bytes,
    result_bytes,
    write_plan,
    write_result,
)
from albireo.ipc.stopping import end_of_tokens
from albireo.scheduler.limits import Limits
from albireo.scheduler.scheduler import Scheduler

VOCAB_SIZE = 13


def token_at(seed: int, position: int) -> int:
    """The model: the token at a position, prompt included, by the seed alone."""
    return ((seed * 0x9E3779B1 + position * 0x85EBCA6B) >> 7) % VOCAB_SIZE


def submission(
    request: int,
    prompt_len: int = 4,
    max_tokens: int = 4,
    *,
    min_tokens: int = 0,
    stop_token_ids: tuple[int, ...] = (),
    seed: int | None = None,
) -> Submit:
    """A request whose prompt, too, is the model's own tokens."""
    seed = request if seed is None else seed
    return Submit(
        request=request,
        prompt_ids=[token_at(seed, position) for position in range(prompt_len)],
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=0.5,
        top_k=7,
        top_p=0.25,
        min_p=0.125,
        seed=seed,
        stop=(),
        stop_token_ids=stop_token_ids,
        include_stop=False,
        skip_special_tokens=True,
    )


def expected_end(submit: Submit) -> tuple[str, list[int]]:
    """(reason, generated tokens) of a request that nobody disturbs."""
    tokens: list[int] = []
    reason = None
    while reason is None:
        tokens.append(token_at(submit.seed, len(submit.prompt_ids) + len(tokens)))
        reason = end_of_tokens(
            tokens[-1],
            len(tokens),
            submit.min_tokens,
            submit.max_tokens,
            frozenset(submit.stop_token_ids),
        )
    return reason, tokens


@dataclass
class WorkerSlot:
    """What a worker knows of a slot.  take: a number of its own for each time it is taken."""

    take: int
    request: int
    seed: int
    prompt_len: int
    position: int
    last_token: int = -1
    table: dict[int, int] = field(default_factory=dict)


class FakeWorker:
    """Carries out plans as the real one does, one position at a time, and looks hard."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[int, WorkerSlot] = {}
        self.kv: dict[tuple[int, int], tuple[int, int, int]] = {}
        self.poisoned: set[int] = set()
        self._takes = 0

    def step(self, plan: PlanView) -> np.ndarray:
        """The rows of a plan's result."""
        for words in plan.take:
            self._takes += 1
            self.slots[int(words[TAKE_SLOT])] = WorkerSlot(
                self._takes,
                int(words[TAKE_REQUEST]),
                int(words[TAKE_SEED_LO]),
                int(words[TAKE_PROMPT_LEN]),
                int(words[TAKE_START]),
            )
        for slot, index, block in plan.append.tolist():
            table = self.slots[slot].table
            assert index == len(table), f"slot {slot}: entry {index} after {len(table)} entries"
            table[index] = block
        rows = []
        at = 0
        for slot, start, length, samples in plan.chunk.tolist():
            state = self.slots[slot]
            assert start == state.position, f"slot {slot} is at {state.position}, not {start}"
            assert length > 0
            for token in plan.chunk_token[at : at + length].tolist():
                self._write(state, token)
            at += length
            if samples:
                rows.append(self._sample(state))
        assert at == len(plan.chunk_token)
        for slot in plan.decode.tolist():
            state = self.slots[slot]
            self._write(state, state.last_token)
            rows.append(self._sample(state))
        return np.array(rows, dtype=np.int32).reshape(-1, ROW_WORDS)

    def _write(self, state: WorkerSlot, token: int) -> None:
        block = state.table[state.position // self.block_size]
        place = (block, state.position % self.block_size)
        self.kv[place] = (state.take, state.position, token)
        state.position += 1

    def _sample(self, state: WorkerSlot) -> tuple[int, int, int]:
        for position in range(state.position):
            place = (state.table[position // self.block_size], position % self.block_size)
            wanted = (state.take, position, token_at(state.seed, position))
            assert self.kv[place] == wanted, f"{place} holds {self.kv[place]}, not {wanted}"
        state.last_token = token_at(state.seed, state.position)
        if state.request in self.poisoned:
            return state.request, 0, 0
        return state.request, 1, state.last_token


@dataclass
class Stream:
    """What the detokenizer has of a request."""

    submit: Submit
    tokens: list[int] = field(default_factory=list)
    end: str | None = None


@dataclass
class Step:
    """A step in flight: its result, the slots that it names, and their blocks."""

    result: memoryview
    slots: set[int]
    blocks: set[int]


class FakeGroup:
    """Scheduler, worker and detokenizer.  A test calls submit, abort, plan, finish_step, run."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self.worker = FakeWorker(limits.block_size)
        self.streams: dict[int, Stream] = {}
        self.first_tokens: list[int] = []
        self.in_flight: deque[Step] = deque()
        self._takes: list[tuple[int, int]] = []  # (step, request)
        self._last_named: dict[int, int] = {}  # request -> step
        self._frame = memoryview(
            bytearray(
                plan_bytes(
                    limits.max_num_seqs, limits.max_num_batched_tokens, limits.block_size
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
        nbytes = write_plan(
            self._frame, plan.step, 0, plan.take, plan.append, plan.chunk, plan.chunk_token,
            plan.decode,
        )  # fmt: skip
        view = PlanView(memoryview(bytes(self._frame[:nbytes])))
        self._check_plan(view)
        rows = self.worker.step(view)
        assert rows[:, 0].tolist() == plan.sampled.tolist()
        result = memoryview(bytearray(result_bytes(self.limits.max_num_seqs)))
        write_result(result, view.step, rows, 5, 4)
        self._check_progress(view)
        slots = set(self._named(view))
        blocks = {block for slot in slots for block in self.worker.slots[slot].table.values()}
        self.in_flight.append(Step(result, slots, blocks))
        assert len(self.in_flight) <= self.limits.lookahead + 1
        return view

    def finish_step(self) -> None:
        """The result of the oldest step in flight comes."""
        result = ResultView(self.in_flight.popleft().result)
        ended = self._detokenize(result.rows)
        told = {end.request: (end.reason, end.generated) for end in self.scheduler.apply(
            result.step, result.rows)}  # fmt: skip
        assert told == ended
        self.scheduler.tables.check()

    def run(self) -> None:
        """Goes on until nothing is left, and checks that nothing is."""
        steps = 0
        while not self.scheduler.idle:
            while self.plan() is not None:
                steps += 1
            assert self.in_flight, "requests are left, but no step is planned"
            self.finish_step()
            assert steps < 10_000, "the requests do not come to an end"
        assert not self.in_flight
        assert self.unfinished() == []
        self.scheduler.check_idle()

    def check_streams(self) -> None:
        """Every request that was left alone has exactly the tokens it should have."""
        for stream in self.streams.values():
            reason, tokens = expected_end(stream.submit)
            if stream.end in ("stop", "length"):
                assert (stream.end, stream.tokens) == (reason, tokens)
            else:
                assert stream.tokens == tokens[: len(stream.tokens)]

    def _named(self, plan: PlanView) -> list[int]:
        return plan.chunk[:, 0].tolist() + plan.decode.tolist()

    def _check_plan(self, plan: PlanView) -> None:
        limits = self.limits
        named = self._named(plan)
        assert named, f"step {plan.step} does nothing"
        assert len(set(named)) == len(named) <= limits.max_num_seqs
        assert len(plan.decode) + len(plan.chunk_token) <= limits.max_num_batched_tokens
        assert int(plan.chunk[:, 2].sum()) == len(plan.chunk_token)
        taken = set(plan.take[:, TAKE_SLOT].tolist())
        for step in self.in_flight:
            assert not taken & step.slots, "a slot is reused under a step in flight"
            for slot, _, block in plan.append.tolist():
                assert block not in step.blocks, f"block {block} is in use, slot {slot} gets it"

    def _check_progress(self, plan: PlanView) -> None:
        """Nobody is computed past its end, or overtaken while it is preempted."""
        for request in plan.take[:, TAKE_REQUEST].tolist():
            self._takes.append((plan.step, request))
            if request in self._last_named:
                since = [r for step, r in self._takes if step > self._last_named[request]]
                assert max(since) == request, f"{since} got slots while {request} was preempted"
        for slot in self._named(plan):
            state = self.worker.slots[slot]
            submit = self.streams[state.request].submit
            assert state.position < len(submit.prompt_ids) + submit.max_tokens
            self._last_named[state.request] = plan.step

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
                if not stream.tokens:
                    self.first_tokens.append(request)
                stream.tokens.append(token)
                stream.end = end_of_tokens(
                    token,
                    len(stream.tokens),
                    submit.min_tokens,
                    submit.max_tokens,
                    frozenset(submit.stop_token_ids),
                )
            if stream.end is not None:
                ended[request] = (stream.end, len(stream.tokens))
        return ended
