"""Who holds what in a group, and how it is let go.

    waiting ── seated (admission.py) ──▶ running ──▶ leaving ──▶ gone, or waiting again

A slot leaves until the last planned step that names it has its result; only
then it and its blocks are free.  A preempted request stands in the queue from
the moment it is preempted, and nobody of its priority and tenant overtakes it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from .blocks import Slots
from .draft import Draft
from .kv_memory import KVMemory
from .limits import Limits
from .requests import Request, Share
from .sequences import Sequences
from .step_times import StepTimes
from .waiting import WaitingQueue


@dataclass(slots=True)
class Counters:
    """What has happened since the start; they only grow.

    prompt_tokens: of admitted requests, not counted again after a preemption.
    generated_tokens: those of surplus rows are not among them.
    finished: requests that came and went, for whatever reason but a refusal.
    prefix_queried_tokens, prefix_hit_tokens: of admitted requests, those that
        the prefix cache was asked for, and those that it had; not after a preemption.
    """

    preemptions: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0


class State:
    """Of one group.

    requests: all that have not ended.  running: slots that are planned, in the
    order they were given.  shares: how many of each run.
    swap_block_us: what it takes to move a KV block to host memory, or back, as a worker says.
    leaving: slot -> the last step that names it.  completed: the last step with
    a result.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.memory = KVMemory(limits)
        self.sequences = Sequences(limits.num_slots, limits.max_model_len)
        self.counters = Counters()
        self.step_times = StepTimes()
        self.swap_block_us = 0.0
        self.queue = WaitingQueue()
        self.requests: dict[int, Request] = {}
        self.running: Slots = np.empty(0, dtype=np.intp)
        self.shares: Counter[Share] = Counter()
        self.leaving: dict[int, int] = {}
        self.completed = 0

    @property
    def next_step(self) -> int:
        """The number that the next plan gets; the first is 1."""
        return self.counters.steps + 1

    def in_need(self) -> int:
        """Running requests that need steps beyond those planned."""
        seq, running = self.sequences, self.running
        return int(np.count_nonzero(seq.planned[running] < seq.end_len[running] - 1))

    def swap_out(self, slot: int, draft: Draft) -> None:
        """Keeps in host memory what fits of a slot that is being preempted, if that pays."""
        recompute_us = self.step_times.token_us * self.limits.block_size
        if self.step_times.token_us and recompute_us < 2 * self.swap_block_us:
            return
        seq = self.sequences
        computed = int(seq.planned[slot])
        blocks = self.memory.swap_out(slot, seq.occupant(slot), computed, draft)
        if blocks:
            self.counters.swapped_out_blocks += blocks
            seq.last_step[slot] = self.next_step

    def preempt(self, slot: int) -> None:
        """Sends a running request back to the queue, with the tokens it has by then.

        Rows of steps in flight still count: the detokenizer shows them.
        """
        request = self.sequences.occupant(slot)
        request.preemptions += 1
        self.counters.preemptions += 1
        self.running = self.running[self.running != slot]
        self._give_share_back(request)
        self.queue.put_back(request)
        self._leave(slot)

    def end(self, request: Request) -> None:
        """Ends a request that holds a slot; drop_ended has to follow."""
        slot = request.slot
        self.forget(request)
        self.sequences.request[slot] = 0
        if slot in self.leaving:
            self.queue.remove(request)
        else:
            self._give_share_back(request)
            self._leave(slot)

    def _give_share_back(self, request: Request) -> None:
        """One of its priority and tenant runs no more."""
        share = request.share
        self.shares[share] -= 1
        if not self.shares[share]:
            del self.shares[share]

    def forget(self, request: Request) -> None:
        """A request has ended."""
        del self.requests[request.number]
        self.counters.finished += 1

    def drop_ended(self) -> None:
        """Takes the slots of ended requests off the running ones."""
        self.running = self.running[self.sequences.request[self.running] != 0]

    def _leave(self, slot: int) -> None:
        """Frees a slot when the last step that names it has its result, perhaps now."""
        last_step = int(self.sequences.last_step[slot])
        if last_step > self.completed:
            self.leaving[slot] = last_step
        else:
            self._vacate(slot)

    def complete(self, step: int) -> None:
        """A step has its result: what waited for it is free."""
        self.completed = step
        if self.leaving:
            done = [slot for slot, last in self.leaving.items() if last <= step]
            for slot in done:
                del self.leaving[slot]
                self._vacate(slot)
        self.memory.completed(step)

    def _vacate(self, slot: int) -> None:
        """Frees a slot and its blocks; a request that is still wanted waits for another one."""
        request = self.sequences.occupant(slot)
        if self.sequences.request[slot]:
            self.sequences.save_tokens(slot)
        else:
            self.memory.forget(request)
        self.memory.tables.release(slot)
        self.sequences.vacate(slot)
