"""The policy: which sequences run in the next step, and with which blocks.

A function of (state, events) to plans: no I/O, no clock.  The process
(process.py), the tests and a simulator call it alike:

    submit, abort, reset    what clients want
    plan() -> Plan | None   the next step, None when there is nothing to plan now
    apply(step, rows)       the result of the oldest step without one

Plans run ahead of results: up to `lookahead` + 1 steps are in flight, and a
plan takes it that every sequence continues.  Lengths are known, so no step is
planned past them; a stop token is seen late, and the surplus row is dropped.

Invariants
- A row counts if its request still holds the slot that the plan named, so that
  a stale row can never reach a slot's next holder.
- A slot and its blocks are freed when the last step that names the slot has
  its result.  (That is rank 0's word; the other ranks run the same steps in
  the same order on one stream each, so whatever a later plan writes there comes
  after.)
- Running requests are older than waiting ones, but for those about to end.
- The oldest request that still needs steps is never preempted, and every other
  one can be: so it always gets on.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from albireo.ipc.messages import Refused, Submit
from albireo.ipc.plan import Int32Array
from albireo.ipc.stopping import end_of_tokens

from .blocks import BlockPool, BlockTables, Slots, blocks_for
from .draft import Draft, Plan
from .limits import Limits
from .sequences import Request, Sequences, new_request
from .waiting import WaitingQueue


@dataclass(slots=True)
class Counters:
    """What has happened since the start; they only grow.

    prompt_tokens: of admitted requests, not counted again after a preemption.
    generated_tokens: those of surplus rows are not among them.
    finished: requests that came and went, for whatever reason but a refusal.
    """

    preemptions: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0


class Ended(NamedTuple):
    """A request that has ended by its rows: reason is "stop", "length" or "failed"."""

    request: int
    reason: str
    generated: int


class Flight(NamedTuple):
    """A step without a result: the slots and the requests of its sampling rows, in order."""

    step: int
    slots: Slots
    requests: Int32Array


class Scheduler:
    """The state of one group, and the policy over it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._block_size = limits.block_size
        self.pool = BlockPool(limits.num_blocks)
        self.tables = BlockTables(
            self.pool, limits.max_num_seqs, limits.max_model_len, limits.block_size
        )
        self.sequences = Sequences(limits.max_num_seqs, limits.max_model_len)
        self.counters = Counters()
        self._requests: dict[int, Request] = {}
        self._queue = WaitingQueue()
        self._running: Slots = np.empty(0, dtype=np.intp)
        self._leaving: dict[int, int] = {}  # slot -> the last step that names it
        self._in_flight: deque[Flight] = deque()
        self._completed = 0
        self._arrivals = 0
        self._draft = Draft(limits.max_num_seqs, limits.max_num_batched_tokens, limits.block_size)

    # ------------------------------------------------------------ state, for whoever drives it
    @property
    def running(self) -> int:
        """Requests that hold a slot and are planned."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """All other requests, those included whose preemption is not complete."""
        return len(self._requests) - len(self._running)

    @property
    def oldest_step(self) -> int | None:
        """The step whose result comes next; None when none is in flight."""
        return self._in_flight[0].step if self._in_flight else None

    @property
    def idle(self) -> bool:
        """Nothing runs, waits or is in flight."""
        return not self._requests and not self._in_flight

    @property
    def next_step(self) -> int:
        """The number that the next plan gets; the first is 1."""
        return self.counters.steps + 1

    def check_idle(self) -> None:
        """Raises RuntimeError when something is still held although nothing is left to do."""
        self.tables.check()
        slots_lost = self.limits.max_num_seqs - self.sequences.free
        if self.idle and (slots_lost or self.pool.free != self.pool.num_blocks):
            raise RuntimeError(
                f"{slots_lost} slots and {self.pool.num_blocks - self.pool.free} blocks are held "
                "although no request is left"
            )

    # ------------------------------------------------------------ events
    def submit(self, submit: Submit) -> Refused | None:
        """Queues a request, or says why it can never run."""
        if submit.request in self._requests:
            raise ValueError(f"request {submit.request} is submitted twice")
        never = self.limits.why_never(len(submit.prompt_ids), submit.max_tokens)
        if never is not None:
            return Refused(submit.request, "too_long", never)
        self._arrivals += 1
        request = new_request(submit, self._arrivals)
        self._requests[request.number] = request
        self._queue.add(request)
        return None

    def abort(self, number: int) -> bool:
        """Gives up a request; False when it is unknown, because it has ended already, say."""
        request = self._requests.get(number)
        if request is None:
            return False
        if request.slot < 0:
            self._forget(request)
            self._queue.remove(request)
        else:
            self._end(request)
            self._drop_ended()
        return True

    def reset(self) -> None:
        """Gives up every request."""
        for number in list(self._requests):
            self.abort(number)

    def apply(self, step: int, rows: Int32Array) -> list[Ended]:
        """Takes the result of a step: rows [n, 3] int32 as in ipc.plan.ResultView.

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
        self._completed = step
        ended = self._accept_rows(flight, rows)
        if self._leaving:
            done = [slot for slot, last in self._leaving.items() if last <= step]
            for slot in done:
                del self._leaving[slot]
                self._vacate(slot)
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
            ended = [self._ended(slot, "failed") for slot in slots[failed].tolist()]
            slots, rows = slots[~failed], rows[~failed]
        else:
            ended = []
        tokens = rows[:, 2]
        self.counters.generated_tokens += len(tokens)
        at_end = self.sequences.accept(slots, tokens)
        if at_end.any():
            for slot, token in zip(slots[at_end].tolist(), tokens[at_end].tolist(), strict=True):
                ended.append(self._ended(slot, self._reason(slot, token)))
        if ended:
            self._drop_ended()
        return ended

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
    def plan(self) -> Plan | None:
        """The next step, or None: enough steps are in flight, or nothing can run now.

        Decodes come first, then the prefills that are under way, then new
        requests: each oldest first, together within max_num_batched_tokens.
        The plan's arrays are valid until the next call.
        """
        if len(self._in_flight) > self.limits.lookahead:
            return None
        self._draft.clear()
        decode = self._plan_decodes()
        budget = self.limits.max_num_batched_tokens - len(decode)
        budget = self._plan_prefills(budget)
        self._admit(budget)
        sampling = decode
        if self._draft.chunks:
            sampling = np.concatenate([self._draft.sampling_chunks(), decode])
        elif not len(decode):
            return None
        step = self.next_step
        self.counters.steps = step
        sampled = self.sequences.request[sampling]
        self._in_flight.append(Flight(step, sampling, sampled))
        return self._draft.plan(step, decode, sampled)

    def _plan_decodes(self) -> Slots:
        """Slots that go on by one token; gives those a block that have filled theirs."""
        seq = self.sequences
        running = self._running
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
        """Too few blocks for `full`: preempts the newest until enough are free or on their way.

        Returns the decodes that can run now, and those of them that get a
        block.  The others wait: a preempted slot's blocks come with the result
        of its last step.
        """
        seq, count = self.sequences, self.tables.count
        to_go = seq.planned[self._running] < seq.end_len[self._running] - 1
        coming = int(count[self._running[~to_go]].sum())
        coming += sum(int(count[slot]) for slot in self._leaving)
        victims = self._running[to_go][1:].tolist()
        while victims and len(full) > self.pool.free + coming:
            victim = victims.pop()
            full, decode = full[full != victim], decode[decode != victim]
            if seq.last_step[victim] > self._completed:
                coming += int(count[victim])
            self._preempt(victim)
        full, stalled = full[: self.pool.free], full[self.pool.free :]
        return decode[~np.isin(decode, stalled)], full

    def _plan_prefills(self, budget: int) -> int:
        """Chunks of the prefills under way; returns what is left of the budget."""
        seq = self.sequences
        in_prefill = seq.planned[self._running] < seq.prefill_len[self._running]
        for slot in self._running[in_prefill].tolist():
            if budget == 0:
                break
            budget -= self._plan_chunk(slot, budget)
        return budget

    def _admit(self, budget: int) -> None:
        """Gives slots to waiting requests, in order, as long as there is room for a next one."""
        if any(self.sequences.request[slot] for slot in self._leaving):
            return  # One that is being preempted comes back before any other.
        admitted: list[int] = []
        running = len(self._running)
        while budget and self.sequences.free and (request := self._queue.head()) is not None:
            # A block more for each that runs, or this one would be preempted soon.
            headroom = running + len(admitted)
            if blocks_for(len(request.tokens), self._block_size) + headroom > self.pool.free:
                break
            self._queue.remove(request)
            slot = self.sequences.place(request)
            self.tables.reserve(slot, len(request.tokens))
            self._draft.add_take(request.take)
            if not request.preemptions:
                self.counters.prompt_tokens += request.prompt_len
            admitted.append(slot)
            budget -= self._plan_chunk(slot, budget)
        if admitted:
            self._running = np.append(self._running, np.array(admitted, dtype=np.intp))

    def _plan_chunk(self, slot: int, budget: int) -> int:
        """The next piece of a slot's prefill, its blocks with it; returns its length."""
        seq, tables = self.sequences, self.tables
        start, prefill_len = int(seq.planned[slot]), int(seq.prefill_len[slot])
        end = min(prefill_len, start + budget)
        first, last = blocks_for(start, self._block_size), blocks_for(end, self._block_size)
        self._draft.add_append(slot, np.arange(first, last), tables.table[slot, first:last])
        self._draft.add_chunk(slot, start, seq.tokens[slot, start:end], end == prefill_len)
        seq.planned[slot] = end
        seq.last_step[slot] = self.next_step
        return end - start

    # ------------------------------------------------------------ leaving a slot
    def _preempt(self, slot: int) -> None:
        """Sends a running request back to the queue, with the tokens it has by then.

        Rows of steps in flight still count: the detokenizer shows them.
        """
        self.sequences.occupant(slot).preemptions += 1
        self.counters.preemptions += 1
        self._running = self._running[self._running != slot]
        self._leave(slot)

    def _ended(self, slot: int, reason: str) -> Ended:
        request = self.sequences.occupant(slot)
        generated = int(self.sequences.length[slot]) - request.prompt_len
        self._end(request)
        return Ended(request.number, reason, generated)

    def _end(self, request: Request) -> None:
        """Ends a request that holds a slot; _drop_ended has to follow."""
        self._forget(request)
        slot = request.slot
        self.sequences.request[slot] = 0
        if slot not in self._leaving:
            self._leave(slot)

    def _forget(self, request: Request) -> None:
        del self._requests[request.number]
        self.counters.finished += 1

    def _drop_ended(self) -> None:
        """Takes the slots of ended requests off the running ones."""
        self._running = self._running[self.sequences.request[self._running] != 0]

    def _leave(self, slot: int) -> None:
        """Frees a slot when the last step that names it has its result, perhaps now."""
        last_step = int(self.sequences.last_step[slot])
        if last_step > self._completed:
            self._leaving[slot] = last_step
        else:
            self._vacate(slot)

    def _vacate(self, slot: int) -> None:
        """Frees a slot and its blocks; a request that still wants to go on is queued again."""
        if self.sequences.request[slot]:
            request = self.sequences.occupant(slot)
            self.sequences.save_tokens(slot)
            self._queue.put_back(request)
        self.tables.release(slot)
        self.sequences.vacate(slot)
