"""The cells of the matrix role x phase x fault, and the order in which they are visited."""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

SERVING = ("router", "gateway", "tokenizer", "scheduler", "detokenizer", "worker")
PHASES = ("queued", "prefill", "stream", "ending")
"""Of a request: it waits (a short prompt without a token), its long prompt is being computed, its
tokens come, all but the last one have come."""
STARVING = ("memory", "files", "shm")
"""No more address space, open files, shared memory (and disk) for a while."""
FAULTS = ("kill", "stop", *STARVING)
ANY_PHASE = "any"


class Cell(NamedTuple):
    """role "client": a connection with requests in flight is closed.  "supervisor": it starves
    while a worker is killed."""

    role: str
    phase: str
    fault: str


def all_cells() -> list[Cell]:
    """Every cell that has a meaning.

    The fork server and its kin serve no request, so that no phase matters; a
    stopped understudy or janitor is noticed by nobody, which is not promised.
    """
    cells = [Cell(*each) for each in itertools.product(SERVING, PHASES, FAULTS)]
    cells += [Cell("supervisor", *each) for each in itertools.product(PHASES, STARVING)]
    cells += [Cell("client", phase, "disconnect") for phase in PHASES]
    cells += [Cell("forkserver", ANY_PHASE, fault) for fault in ("kill", "stop")]
    return cells + [Cell(role, ANY_PHASE, "kill") for role in ("understudy", "janitor")]


def pairwise(cells: list[Cell], rng: random.Random) -> list[Cell]:
    """A selection in which every pair (role, phase), (role, fault), (phase, fault) occurs."""
    left = set().union(*(_pairs(cell) for cell in cells))
    chosen: list[Cell] = []
    pool = rng.sample(cells, len(cells))
    while left:
        best = max(pool, key=lambda cell: len(_pairs(cell) & left))
        chosen.append(best)
        left -= _pairs(best)
    return chosen


def in_order(cells: list[Cell], rng: random.Random) -> list[Cell]:
    """All cells, a pairwise selection first: who has less time has seen the most of it."""
    first = pairwise(cells, rng)
    rest = [cell for cell in cells if cell not in set(first)]
    return first + rng.sample(rest, len(rest))


def _pairs(cell: Cell) -> set[tuple[str, str, str]]:
    return {
        ("role-phase", cell.role, cell.phase),
        ("role-fault", cell.role, cell.fault),
        ("phase-fault", cell.phase, cell.fault),
    }
