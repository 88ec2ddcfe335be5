"""From the queue to a slot: who is admitted by a plan, and who makes way for it."""

from __future__ import annotations

from albireo.ipc.config import blocks_for
from albireo.ipc.plan import TAKE_START

from .draft import Draft
from .kv_memory import Found
from .preemption import make_way
from .requests import Request
from .state import State

_CHARGE_STEPS = 16
"""So often tenants pay for the tokens that they generate: one for each that runs and each step."""


class Admission:
    """Over a group's state; the plan's takes go to `draft`."""

    def __init__(self, state: State, draft: Draft) -> None:
        self._state = state
        self._draft = draft
        self._block_size = state.limits.block_size
        # How many more the step has room for.
        self._places = 0
        # The step for which tenants have paid last.
        self._charged = 0
        # A request that waits for blocks, and how many it needs.
        self._short: tuple[int, int] = 0, 0

    def begin(self) -> None:
        """Before anything else of a plan."""
        self._places = self._state.limits.max_num_seqs - self._state.in_need()

    def charge(self) -> None:
        """Before the first call of `next` for a plan: tenants pay for what runs."""
        self._short = 0, 0
        state = self._state
        step = state.next_step  # The same as before where nothing could be planned.
        if len(state.queue) and step % _CHARGE_STEPS == 0 and step != self._charged:
            self._charged = step
            for share, running in state.shares.items():
                state.queue.charge(share, running * _CHARGE_STEPS)

    def next(self, admitted: int, budget: int) -> int | None:
        """Gives the queue's head a slot, its take to the plan; None when it has to wait.

        admitted: how many this plan has admitted before.  budget: tokens that it has left.
        """
        state = self._state
        request = state.queue.head()
        if request is None or not self._has_place(admitted):
            return None
        # A block more for each that runs, or this one would be preempted soon.
        headroom = len(state.running) + admitted
        found = self._room_for(request, headroom, budget, self._places - admitted)
        return None if found is None else self._seat(request, found)

    def make_way(self) -> None:
        """Preempts for the next waiting request, where it has the better claim (preemption.py)."""
        head = self._state.queue.head()
        if head is None or head.slot >= 0 or self._state.leaving or not len(self._state.running):
            return
        seq, running = self._state.sequences, self._state.running
        number, needed = self._short
        missing = (
            0 if number != head.number else needed + len(running) - self._state.memory.pool.free
        )
        if self._has_place() and missing <= 0:
            return  # Whether it has to wait is yet to be seen.
        victims = make_way(
            head, missing, seq, self._state.memory.tables, running, self._state.shares
        )
        if victims and (seq.planned[running] < seq.end_len[running] - 1).all():
            for slot in victims:
                self._state.preempt(slot)
            self._places += len(victims)

    def _has_place(self, admitted: int = 0) -> bool:
        """Whether a step has room for one more, and there is a slot."""
        return admitted < self._places and self._state.sequences.free > 0

    def _room_for(self, request: Request, headroom: int, budget: int, places: int) -> Found | None:
        """What there is of the request; None when it cannot be admitted by this plan.

        headroom: blocks to leave free.  budget: tokens that the plan has left.
        places: chunks that it may have, with this one.
        """
        if request.slot >= 0:
            return None  # It has been preempted, and its last step is not done yet.
        draft = self._draft
        if request.scores and not draft.scores_left:
            return None
        room = self._state.memory.pool.free - headroom
        if room < 1:
            self._short = request.number, blocks_for(len(request.tokens), self._block_size)
            return None
        found = self._state.memory.find(request, room, draft.copies_left)
        if found is None:
            return None
        if found.blocks > room:
            self._short = request.number, found.blocks
            return None
        there = blocks_for(found.tokens, self._block_size)
        fits = draft.has_room(
            edits=len(request.edits),
            history=found.tokens if request.counts else 0,
            # Besides, those of all chunks that may follow, each with a partial block.
            appends=there + budget // self._block_size + places,
            copies=len(found.swapped) + (found.copied >= 0),
            grammar=len(request.grammar),
        )
        return found if fits else None

    def _seat(self, request: Request, found: Found) -> int:
        """Takes the queue's head to a slot, with what was found of it."""
        self._state.queue.take(request, len(request.tokens) - found.tokens)
        slot = self._state.sequences.place(request, found.tokens)
        self._state.shares[request.share] += 1
        request.take[TAKE_START] = found.tokens
        self._draft.add_take(request.take, request.edits, slot)
        self._state.memory.seat(slot, request, found, self._draft, self._state.next_step)
        if found.tokens and request.counts:
            self._draft.add_history(slot, request.tokens[: found.tokens])
        if request.grammar:
            self._draft.add_grammar(slot, request.grammar)
        counters = self._state.counters
        counters.swapped_in_blocks += len(found.swapped)
        if not request.preemptions:
            counters.prompt_tokens += request.prompt_len
            counters.prefix_queried_tokens += found.queried
            counters.prefix_hit_tokens += found.hit
        return slot
