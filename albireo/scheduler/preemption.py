"""Who is preempted: pure choices over the running requests; the scheduler acts on them.

Two things can be asked for, and the most important running request that still
needs steps is given up for neither:

    growth    running requests have filled their blocks and none is free: the
              least important go (newest of the lowest priority, with aging)
    a place   a waiting request has a better claim than a running one: it is of a
              more important priority, or its tenant has at least two less
              running at this priority than another one has
"""

from __future__ import annotations

from collections import Counter

from .blocks import BlockTables, Slots
from .requests import Request
from .sequences import Sequences

Share = tuple[int, str]
"""Priority and tenant: requests that wait for each other first come, first served."""


def give_up_for_growth(
    seq: Sequences, tables: BlockTables, growing: Slots, candidates: Slots, free: int
) -> list[int]:
    """Slots to preempt so that the rest of `growing` get a block each; the least important first.

    candidates: running slots that still need steps.  free: blocks that are
    free or on their way.
    """
    missing = len(growing) - free
    growing_slots = set(growing.tolist())
    victims: list[int] = []
    for slot in seq.by_importance(candidates)[:0:-1].tolist():
        if missing <= 0:
            break
        victims.append(slot)
        missing -= tables.sole(slot) + (slot in growing_slots)
    return victims


def make_way(
    head: Request,
    missing_blocks: int,
    seq: Sequences,
    tables: BlockTables,
    running: Slots,
    shares: Counter[Share],
) -> list[int]:
    """Slots to preempt so that the waiting `head` gets a slot and its blocks; empty = it waits.

    All or nothing: nobody is given up for a request that would not fit even then.
    """
    mine = shares[head.priority, head.tenant]
    largest = max(
        (count for (priority, _), count in shares.items() if priority == head.priority), default=0
    )
    if largest < mine + 2 and all(priority <= head.priority for priority, _ in shares):
        return []
    ranked = seq.by_importance(running)[:0:-1].tolist()
    less_important = [
        slot
        for slot in ranked
        if (other := seq.occupant(slot)).priority > head.priority and other.order > head.order
    ]
    victims = _enough(less_important, missing_blocks, tables)
    if not victims and largest >= mine + 2:
        priority_slots = [
            (slot, other.tenant)
            for slot in ranked
            if (other := seq.occupant(slot)).priority == head.priority
        ]
        richest = min(
            tenant
            for (priority, tenant), count in shares.items()
            if priority == head.priority and count == largest
        )
        theirs = [slot for slot, tenant in priority_slots if tenant == richest]
        victims = _enough(theirs[: (largest - mine) // 2], missing_blocks, tables)
    return victims


def _enough(candidates: list[int], missing_blocks: int, tables: BlockTables) -> list[int]:
    """The first of the candidates that free a slot and so many blocks; empty when all do not."""
    freed = 0
    for count, slot in enumerate(candidates, 1):
        freed += tables.sole(slot) + 1  # The block that was to be left free for it.
        if freed >= missing_blocks:
            return candidates[:count]
    return []
