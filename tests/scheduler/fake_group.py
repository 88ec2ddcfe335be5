"""A group without processes: the real Scheduler, a naive worker, a naive detokenizer.

Plans and results pass through frames in their real layout.  The worker keeps
per place in the cache which token was written there and after which ones, in
device and host blocks, and refuses to attend to anything else; the group checks
budgets, reuse of blocks and slots under steps in flight, and that each request
ends once, with the tokens it should have, and in its turn.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

import numpy as np

from albireo.ipc.messages import Refused, Submit
from albireo.ipc.plan import (
    COPY_IN,
    COPY_OUT,
    EDIT_BAN_UNTIL,
    EDIT_BIAS,
    MAX_PLAN_COPIES,
    MAX_PLAN_EDITS,
    MAX_PLAN_SCORES,
    ROW_WORDS,
    TAKE_COUNTS,
    TAKE_EDITS,
    TAKE_FLAGS,
    TAKE_GRAMMAR,
    TAKE_PROMPT_LEN,
    TAKE_REQUEST,
    TAKE_SEED_LO,
    TAKE_SLOT,
    TAKE_START,
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

VOCAB_SIZE = 13


def token_at(seed: int, position: int) -> int:
    """The model: the token at a position, prompt included, by the seed alone.

    Sequences of one seed are equal.  seed = 1000 x n + own: the first n tokens
    are those of seed 0, so that others share them.
    """
    common, own = divmod(seed, 1000)
    if position < common:
        own = 0
    return ((own * 0x9E3779B1 + position * 0x85EBCA6B) >> 7) % VOCAB_SIZE


def submission(
    request: int,
    prompt_len: int = 4,
    max_tokens: int = 4,
    *,
    seed: int | None = None,
    **how: object,
) -> Submit:
    """A request whose prompt, too, is the model's own tokens.

    resumed (of `how`): so many tokens of its answer are given with the prompt.
    """
    seed = request if seed is None else seed
    given = prompt_len + int(how.get("resumed", 0))  # type: ignore[call-overload]
    values: dict[str, object] = {
        "min_tokens": 0, "temperature": 0.5, "top_k": 7, "top_p": 0.25, "min_p": 0.125,
        "stop": (), "stop_token_ids": (), "include_stop": False, "skip_special_tokens": True,
    }  # fmt: skip
    return Submit(
        request=request,
        prompt_ids=[token_at(seed, position) for position in range(given)],
        max_tokens=max_tokens,
        seed=seed,
        **(values | how),  # type: ignore[arg-type]
    )


def expected_end(submit: Submit) -> tuple[str, list[int]]:
    """(reason, generated tokens) of a request that nobody disturbs; resumed ones not among them."""
    tokens: list[int] = []
    reason = None
    while reason is None:
        tokens.append(token_at(submit.seed, len(submit.prompt_ids) + len(tokens)))
        reason = end_of_tokens(
            tokens[-1],
            submit.resumed + len(tokens),
            submit.min_tokens,
            submit.max_tokens,
            frozenset(submit.stop_token_ids),
        )
    return reason, tokens


def chain(seed: int, length: int) -> list[int]:
    """For each position what its keys and values depend on: all tokens up to it."""
    links, link = [], 0
    for position in range(length):
        link = hash((link, token_at(seed, position)))
        links.append(link)
    return links


def expected_edits(submit: Submit) -> list[tuple[int, int, int]]:
    """(kind, token, value) of the edits that these tests use."""
    edits = [
        (EDIT_BIAS, token, int(np.float32(bias).view(np.int32)))
        for token, bias in submit.logit_bias.items()
    ]
    if submit.min_tokens:
        edits += [(EDIT_BAN_UNTIL, token, 0) for token in submit.stop_token_ids]
    return edits


@dataclass
class WorkerSlot:
    """What a worker knows of a slot.  take: a number of its own for each time it is taken.

    told: how often each position's token came, where penalties need them all.
    """

    take: int
    request: int
    seed: int
    prompt_len: int
    position: int
    counts: bool
    edits: bool
    last_token: int = -1
    link: int = 0
    table: dict[int, int] = field(default_factory=dict)
    told: Counter[int] = field(default_factory=Counter)
    edited: list[tuple[int, ...]] = field(default_factory=list)


class FakeWorker:
    """Carries out plans as the real one does, one position at a time, and looks hard.

    kv, host: (block, place in it) -> link, the token and all before it, as a number.
    scored: request -> prompt positions whose tokens were scored.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[int, WorkerSlot] = {}
        self.kv: dict[tuple[int, int], int] = {}
        self.host: dict[tuple[int, int], int] = {}
        self.poisoned: set[int] = set()
        self.scored: defaultdict[int, list[int]] = defaultdict(list)
        self._takes = 0

    def step(self, plan: PlanView) -> np.ndarray:
        """The rows of a plan's result."""
        for kind, source, target in plan.copy.tolist():
            read = self.host if kind == COPY_IN else self.kv
            write = self.host if kind == COPY_OUT else self.kv
            for place in range(self.block_size):
                write[target, place] = read.get((source, place), 0)
        for words in plan.take:
            self._take(words)
        for slot, index, block in plan.append.tolist():
            table = self.slots[slot].table
            assert index == len(table), f"slot {slot}: entry {index} after {len(table)} entries"
            table[index] = block
        for slot, *edit in plan.edit.tolist():
            self.slots[slot].edited.append(tuple(edit))
        at = 0
        for slot, start, length in plan.history.tolist():
            state = self.slots[slot]
            assert state.counts, "history for a slot that does not count"
            for offset, token in enumerate(plan.history_token[at : at + length].tolist()):
                self._tell(state, start + offset, token)
            at += length
        assert at == len(plan.history_token)
        for state in self.slots.values():
            if state.position and not state.link:
                state.link = chain(state.seed, state.position)[-1]
        rows = self._chunks(plan)
        for slot in plan.decode.tolist():
            state = self.slots[slot]
            self._write(state, state.last_token)
            rows.append(self._sample(state))
        return np.array(rows, dtype=np.int32).reshape(-1, ROW_WORDS)

    def _take(self, words: np.ndarray) -> None:
        self._takes += 1
        flags = int(words[TAKE_FLAGS])
        self.slots[int(words[TAKE_SLOT])] = WorkerSlot(
            self._takes,
            int(words[TAKE_REQUEST]),
            int(words[TAKE_SEED_LO]),
            int(words[TAKE_PROMPT_LEN]),
            int(words[TAKE_START]),
            bool(flags & (TAKE_COUNTS | TAKE_GRAMMAR)),
            bool(flags & TAKE_EDITS),
        )

    def _chunks(self, plan: PlanView) -> list[tuple[int, int, int]]:
        rows = []
        score = dict(plan.score.tolist())
        assert len(score) == len(plan.score)
        at = 0
        for slot, start, length, samples in plan.chunk.tolist():
            state = self.slots[slot]
            assert start == state.position, f"slot {slot} is at {state.position}, not {start}"
            assert length > 0
            for row in range(at, at + length):
                self._tell(state, state.position, int(plan.chunk_token[row]))
                self._write(state, int(plan.chunk_token[row]))
                if row in score:
                    assert score.pop(row) == token_at(state.seed, state.position)
                    self.scored[state.request].append(state.position)
            at += length
            if samples:
                rows.append(self._sample(state))
        assert at == len(plan.chunk_token)
        assert not score
        return rows

    def _tell(self, state: WorkerSlot, position: int, token: int) -> None:
        assert token == token_at(state.seed, position)
        state.told[position] += 1

    def _write(self, state: WorkerSlot, token: int) -> None:
        block = state.table[state.position // self.block_size]
        state.link = hash((state.link, token))
        self.kv[block, state.position % self.block_size] = state.link
        state.position += 1

    def _sample(self, state: WorkerSlot) -> tuple[int, int, int]:
        for position, link in enumerate(chain(state.seed, state.position)):
            place = (state.table[position // self.block_size], position % self.block_size)
            assert self.kv.get(place) == link, f"{place} does not hold position {position}"
        if state.counts:
            assert state.told == dict.fromkeys(range(state.position), 1)
        assert state.edits == bool(state.edited)
        state.last_token = token_at(state.seed, state.position)
        self._tell(state, state.position, state.last_token)
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
