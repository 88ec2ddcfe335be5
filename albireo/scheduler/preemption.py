"""Who is preempted: pure choices over the running requests; the scheduler acts on them.

Two things can be asked for, and the most important running request that still
needs steps is given up for neither:

    growth    running requests have filled their blocks and none is free: the
              least important go (newest of the lowest priority, with aging)
    a place   a waiting request has a better claim than a running one: it is of a
              more important priority, or its tenant has less running at this
              priority than another one has, each by its weight, and still not more
              when that one has made way
"""

from __future__ import annotations

import math
from collections import Counter

from .blocks import BlockTables, Slots
from .requests import Request, Share
from .sequences import Sequences


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
    richest, due = _richest(head.share, shares)
    if not due and all(share.priority <= head.priority for share in shares):
        return []
    ranked = seq.by_importance(running)[:0:-1].tolist()
    less_important = [
        slot
        for slot in ranked
        if (other := seq.occupant(slot)).priority > head.priority and other.order > head.order
    ]
    victims = _enough(less_important, missing_blocks, tables)
    if not victims and due:
        theirs = [slot for slot in ranked if seq.occupant(slot).share == richest]
        victims = _enough(theirs[:due], missing_blocks, tables)
    return victims


def _richest(mine: Share, shares: Counter[Share]) -> tuple[Share, int]:
    """Of `mine`'s priority, who has most to give to it, and how many.

    So many that, were they to change hands, both would have their weights' part
    of what they run together: k with (its - k) / its weight = (mine + k) / my weight.
    """
    richest, most = mine, 0.0
    for share, count in shares.items():
        if share.priority == mine.priority:
            surplus = count * mine.weight - shares[mine] * share.weight
            due = surplus / (mine.weight + share.weight)
            if due > most or (due == most and share < richest):
                richest, most = share, due
    return richest, math.floor(most)


def _enough(candidates: list[int], missing_blocks: int, tables: BlockTables) -> list[int]:
    """The first of the candidates that free a slot and so many blocks; empty when all do not."""
    freed = 0
    for count, slot in enumerate(candidates, 1):
        freed += tables.sole(slot) + 1  # The block that was to be left free for it.
        if freed >= missing_blocks:
            return candidates[:count]
    return []
