"""The policy: which sequences run in the next step, and with which blocks.

A function of (state, events) to plans: no I/O, no clock.  The process
(process.py), the tests and a simulator call it alike:

    submit, abort, reset    what clients want
    plan() -> Plan | None   the next step, None when there is nothing to plan now
    apply(step, rows, us)   the result of the oldest step without one, and its time

Plans run ahead of results: up to `lookahead` + 1 steps are in flight, more than
two only while they are so short that a result would come late for the next
plan.  A plan takes it that every sequence continues.  Lengths are known, so no
step is planned past them; a stop token is seen late, and the surplus rows are
dropped.

Invariants
- A row counts if its request still holds the slot that the plan named, so that
  a stale row can never reach a slot's next holder.
- A slot and its blocks are freed when the last step that names the slot has
  its result.  (That is rank 0's word; the other ranks run the same steps in
  the same order on one stream each, so whatever a later plan writes there comes
  after.)
- Requests of one priority and tenant are admitted in the order they came in.
- The most important request that runs and still needs steps (requests.py has
  the order) is never preempted, and every other one can be: so it always gets on.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import NamedTuple

import numpy as np

from albireo.ipc.config import blocks_for
from albireo.ipc.messages import Refused, Submit
from albireo.ipc.plan import MAX_PLAN_EDITS, ROW_GRAMMAR_END, ROW_NOT_FINITE, Int32Array
from albireo.ipc.stopping import end_of_tokens

from .admission import Admission
from .blocks import BlockPool, Slots
from .chunk_budget import chunk_budget
from .draft import Draft, Plan
from .limits import Limits
from .preemption import give_up_for_growth
from .requests import new_request
from .state import State

_LONG_STEP_US, _LONG_BEHIND_AN_END_US = 30_000.0, 8_000.0
"""The second where the step before has ended a request by its rows: who has an answer often asks
again, and is back within some milliseconds."""
_WAIT_FOR_MORE = 0.75
"""Of a long step, before the next one is planned."""
_ENOUGH_AHEAD_US = 1_000.0
"""Behind the step that runs.  From its end to the launch of the next plan it takes 0.3 to 0.5 ms,
now and then as much again, and a device that has nothing to do meanwhile makes everybody late."""


class Ended(NamedTuple):
    """A request that has ended by its rows: reason is "stop", "length" or "failed"."""

    request: int
    reason: str
    generated: int


class Flight(NamedTuple):
    """A step without a result.

    slots, requests: of its sampling rows, in order.  chunk_tokens: of its prefill.
    """

    step: int
    slots: Slots
    requests: Int32Array
    chunk_tokens: int


class Scheduler:
    """The state of one group, and the policy over it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._block_size = limits.block_size
        self._state = state = State(limits)
        self.sequences = state.sequences
        self.memory = state.memory
        self.tables = state.memory.tables
        self.counters = state.counters
        self.step_times = state.step_times
        self._draft = Draft(limits)
        self._admission = Admission(state, self._draft)
        self._in_flight: deque[Flight] = deque()
        self._arrivals = 0
        self._last_ending_step = -1

    # ------------------------------------------------------------ state, for whoever drives it
    @property
    def pool(self) -> BlockPool:
        """The KV blocks."""
        return self.memory.pool

    @property
    def running(self) -> int:
        """Requests that hold a slot and are planned."""
        return len(self._state.running)

    @property
    def waiting(self) -> int:
        """All other requests, those included whose preemption is not complete."""
        return len(self._state.requests) - len(self._state.running)

    @property
    def waiting_by_priority(self) -> dict[int, int]:
        """The same, by their priority."""
        return self._state.queue.by_priority()

    @property
    def oldest_step(self) -> int | None:
        """The step whose result comes next; None when none is in flight."""
        return self._in_flight[0].step if self._in_flight else None

    @property
    def swap_block_us(self) -> float:
        """What it takes to move a KV block to host memory, or back."""
        return self._state.swap_block_us

    @swap_block_us.setter
    def swap_block_us(self, measured: float) -> None:
        self._state.swap_block_us = measured

    @property
    def idle(self) -> bool:
        """Nothing runs, waits or is in flight."""
        return not self._state.requests and not self._in_flight

    @property
    def next_step(self) -> int:
        """The number that the next plan gets; the first is 1."""
        return self._state.next_step

    def check_idle(self, thoroughly: bool = True) -> None:
        """Raises RuntimeError when something is still held although nothing is left to do.

        thoroughly: also where each block is, which takes time for every one of them.
        """
        if thoroughly:
            self.memory.check()
        slots_lost = self.limits.num_slots - self.sequences.free
        blocks_lost = self.pool.num_blocks - self.pool.free
        host_lost = self.limits.num_swap_blocks - self.memory.host.free
        if self.idle and (slots_lost or blocks_lost or host_lost):
            raise RuntimeError(
                f"{slots_lost} slots, {blocks_lost} blocks and {host_lost} host blocks are held "
                "although no request is left"
            )

    # ------------------------------------------------------------ events
    def submit(self, submit: Submit) -> Refused | None:
        """Queues a request, or says why it can never run."""
        if submit.request in self._state.requests:
            raise ValueError(f"request {submit.request} is submitted twice")
        prompt_len = len(submit.prompt_ids) - submit.resumed
        never = self.limits.why_never(prompt_len, submit.max_tokens)
        if never is not None:
            return Refused(submit.request, "too_long", never)
        if submit.resumed >= submit.max_tokens:
            had = f"{submit.resumed} tokens of max_tokens {submit.max_tokens} are there already"
            return Refused(submit.request, "invalid_request", f"{had}: nothing is left to do")
        request = new_request(submit, self._arrivals + 1, self.next_step)
        if len(request.edits) > MAX_PLAN_EDITS:
            return Refused(
                submit.request,
                "invalid_request",
                f"logit_bias, allowed_token_ids, bad_words and min_tokens name "
                f"{len(request.edits)} tokens together; at most {MAX_PLAN_EDITS} are possible",
            )
        self._arrivals += 1
        self._state.requests[request.number] = request
        self._state.queue.add(request)
        return None

    def abort(self, number: int) -> bool:
        """Gives up a request; False when it is unknown, because it has ended already, say."""
        request = self._state.requests.get(number)
        if request is None:
            return False
        if request.slot < 0:
            self._state.queue.remove(request)
            self.memory.forget(request)
            self._state.forget(request)
        else:
            self._state.end(request)
            self._state.drop_ended()
        return True

    def reset(self) -> None:
        """Gives up every request."""
        for number in list(self._state.requests):
            self.abort(number)

    def apply(self, step: int, rows: Int32Array, step_us: int = 0) -> list[Ended]:
        """Takes the result of a step: rows [n, 3] int32 as in ipc.plan.ResultView.

        step_us: what it took; 0 = not known.
        Returns the requests that end with it.  Raises ValueError when it is not
        the result of the oldest step in flight.
        """
        flight = self._in_flight[0] if self._in_flight else None
        if flight is None or flight.step != step:
            raise ValueError(f"a result of step {step} has come; expected: {self.oldest_step}")
        if not np.array_equal(rows[:, 0], flight.requests):
            raise ValueError(
                f"step {step} was planned for requests {flight.requests.tolist()}; "
                f"its result names {rows[:, 0].tolist()}"
            )
        self._in_flight.popleft()
        if step_us:
            self.step_times.add(flight.chunk_tokens, step_us)
        ended = self._accept_rows(flight, rows)
        if ended:
            self._last_ending_step = step
        self._state.complete(step)
        return ended

    def _accept_rows(self, flight: Flight, rows: Int32Array) -> list[Ended]:
        """Adds the rows' tokens to their requests, and ends those that end."""
        slots = flight.slots
        wanted = self.sequences.request[slots] == flight.requests
        if not wanted.all():
            slots, rows = slots[wanted], rows[wanted]
        failed = rows[:, 1] == 0
        if failed.any():
            # Without a token; the rest goes on as if these rows were not there.
            ended = [
                self._ended(slot, "stop") if why == ROW_GRAMMAR_END else self._failed(slot, why)
                for slot, why in zip(slots[failed].tolist(), rows[failed, 2].tolist(), strict=True)
            ]
            slots, rows = slots[~failed], rows[~failed]
        else:
            ended = []
        tokens = rows[:, 2]
        self.counters.generated_tokens += len(tokens)
        lengths, at_end = self.sequences.accept(slots, tokens)
        self.memory.name_filled(self.sequences, slots, lengths)
        if at_end.any():
            for slot, token in zip(slots[at_end].tolist(), tokens[at_end].tolist(), strict=True):
                ended.append(self._ended(slot, self._reason(slot, token)))
        if ended:
            self._state.drop_ended()
        return ended

    def _ended(self, slot: int, reason: str) -> Ended:
        request = self.sequences.occupant(slot)
        generated = int(self.sequences.length[slot]) - request.prompt_len
        self._state.end(request)
        return Ended(request.number, reason, generated)

    def _failed(self, slot: int, why: int) -> Ended:
        if why == ROW_NOT_FINITE:  # else it is the request's own parameters, and its KV is sound
            self.memory.distrust(slot)
        return self._ended(slot, "failed")

    def _reason(self, slot: int, token: int) -> str:
        request = self.sequences.occupant(slot)
        reason = end_of_tokens(
            token,
            int(self.sequences.length[slot]) - request.prompt_len,
            request.min_len - request.prompt_len,
            request.end_len - request.prompt_len,
            request.stop_ids,
        )
        if reason is None:
            raise RuntimeError(f"request {request.number} ends with token {token} for no reason")
        return reason

    # ------------------------------------------------------------ planning
    def plan_after_us(self) -> float:
        """How long after the oldest step in flight has begun the next plan should be made.

        0.0: at once.  While a long step runs, requests come that the next one can have.  The rest
        of it is several times what it takes to plan, and to send the plan; should the step end
        sooner, that is all that is lost.
        """
        if not self._in_flight or self._is_enough_ahead():
            return 0.0
        runs = self._in_flight[0]
        expected = self.step_times.soonest_us(runs.chunk_tokens)
        long = _LONG_BEHIND_AN_END_US if self._may_be_asked_again(runs.step) else _LONG_STEP_US
        return _WAIT_FOR_MORE * expected if expected >= long else 0.0

    def _is_enough_ahead(self) -> bool:
        """As many steps as may be lie behind the one that runs, or some that take long enough.

        Of prefills it is not known how short they are until some of their length have run.
        """
        behind = len(self._in_flight) - 1
        if behind < 1 or behind >= self.limits.lookahead:
            return behind >= self.limits.lookahead
        ahead = islice(self._in_flight, 1, None)
        if not self.step_times.steps or any(flight.chunk_tokens for flight in ahead):
            return True
        return behind * self.step_times.soonest_us(0) >= _ENOUGH_AHEAD_US

    def _may_be_asked_again(self, running: int) -> bool:
        """A request has just ended, and the next step has room for another."""
        return (
            self._last_ending_step == running - 1
            and self.sequences.free > 0
            and self._state.queue.prompt_tokens < self.limits.max_num_batched_tokens
        )

    def plan(self) -> Plan | None:
        """The next step, or None: enough steps are in flight, or nothing can run now.

        Decodes come first, then the prefills that are under way, then waiting
        requests, together within max_num_batched_tokens (and chunk_budget.py).  The
        plan's arrays are valid until the next call.
        """
        if self._is_enough_ahead():
            return None
        self._draft.clear()
        self._admission.begin()
        if len(self._state.queue):
            self._admission.make_way()
        decode = self._plan_decodes()
        self._admit(self._plan_prefills(len(decode)))
        sampling = decode
        if self._draft.chunks:
            sampling = np.concatenate([self._draft.sampling_chunks(), decode])
            self.memory.planned()
        elif not len(decode):
            return None
        step = self.next_step
        self.counters.steps = step
        sampled = self.sequences.request[sampling]
        self._in_flight.append(Flight(step, sampling, sampled, self._draft.chunk_tokens))
        return self._draft.plan(step, decode, sampled)

    def _plan_decodes(self) -> Slots:
        """Slots that go on by one token; gives those a block that have filled theirs."""
        seq = self.sequences
        running = self._state.running
        planned = seq.planned[running]
        ready = (planned >= seq.prefill_len[running]) & (planned < seq.end_len[running] - 1)
        decode: Slots = running[ready][: self.limits.max_num_batched_tokens]
        full = decode[seq.planned[decode] == self.tables.capacity[decode]]
        if len(full):
            if len(full) > self.pool.free:
                decode, full = self._relieve(decode, full)
            index, blocks = self.tables.grow(full)
            self._draft.add_append(full, index, blocks)
        seq.planned[decode] += 1
        seq.last_step[decode] = self.next_step
        return decode

    def _relieve(self, decode: Slots, full: Slots) -> tuple[Slots, Slots]:
        """Too few blocks for `full`: preempts until enough are free or on their way.

        Returns the decodes that can run now, and those of them that get a
        block, the most important first.  The others wait: a preempted slot's
        blocks come with the result of its last step.
        """
        seq = self.sequences
        to_go = seq.planned[self._state.running] < seq.end_len[self._state.running] - 1
        coming = [*self._state.running[~to_go].tolist(), *self._state.leaving]
        free = self.pool.free + sum(self.tables.sole(slot) for slot in coming)
        victims = give_up_for_growth(seq, self.tables, full, self._state.running[to_go], free)
        full, decode = full[~np.isin(full, victims)], decode[~np.isin(decode, victims)]
        # A plan of nothing but copies is none: then what is lost is computed again.
        swap = len(decode) > len(full) or (len(full) > 0 and self.pool.free > 0)
        for slot in victims:
            if swap:
                self._state.swap_out(slot, self._draft)
            self._state.preempt(slot)
        full = seq.by_importance(full)
        full, stalled = full[: self.pool.free], full[self.pool.free :]
        return decode[~np.isin(decode, stalled)], full

    def _plan_prefills(self, decodes: int) -> int:
        """Chunks of the prefills under way; returns what is left of the step's budget."""
        seq, running = self.sequences, self._state.running
        left = seq.prefill_len[running] - seq.planned[running]
        under_way = left > 0
        slots = running[under_way].tolist()
        to_compute = self._state.queue.prompt_tokens
        if slots:
            to_compute += int(left[under_way].sum())
        budget = chunk_budget(self.limits, self.step_times, decodes, to_compute)
        for slot in slots:
            if budget == 0:
                break
            budget -= self._plan_chunk(slot, budget)
        return budget

    def _plan_chunk(self, slot: int, budget: int) -> int:
        """The next piece of a slot's prefill, its blocks with it; returns its length."""
        seq, tables, draft = self.sequences, self.tables, self._draft
        request = seq.occupant(slot)
        start, prefill_len = int(seq.planned[slot]), int(seq.prefill_len[slot])
        end = min(prefill_len, start + budget)
        first_score = last_score = 0
        if request.scores:
            first_score = max(start, request.unscored)
            end = max(start, min(end, first_score + draft.scores_left))
            last_score = min(end, request.prompt_len - 1)
        if end == start:
            return 0  # Other prompts take all scores of this plan.
        first, last = blocks_for(start, self._block_size), blocks_for(end, self._block_size)
        draft.add_append(slot, np.arange(first, last), tables.table[slot, first:last])
        draft.add_chunk(slot, start, seq.tokens[slot, start:end], end == prefill_len)
        if first_score < last_score:
            draft.add_scores(
                first_score - start, seq.tokens[slot, first_score + 1 : last_score + 1]
            )
            request.unscored = last_score
        self.memory.fill(slot, request, start, end)
        seq.planned[slot] = end
        seq.last_step[slot] = self.next_step
        return end - start

    def _admit(self, budget: int) -> None:
        """Gives slots to waiting requests, in order, as long as there is room for a next one."""
        admitted: list[int] = []
        self._admission.charge()
        while budget and (slot := self._admission.next(len(admitted), budget)) is not None:
            admitted.append(slot)
            budget -= self._plan_chunk(slot, budget)
        if admitted:
            state = self._state
            state.running = np.append(state.running, np.array(admitted, dtype=np.intp))
