"""The cells of the matrix role x phase x fault, and which are visited together."""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

OF_A_GROUP = ("worker", "scheduler", "detokenizer")
BESIDE = ("tokenizer", "gateway", "client")
SERVING = ("router", "tokenizer", "gateway", *OF_A_GROUP)
ALONG = ("understudy", "janitor")
PHASES = ("queued", "prefill", "stream", "ending")
"""Of a request: it waits for a place among those that run, its prompt is being computed, its
client has a token and more are to be computed, its last token is computed and not with its client.
sight.py says how each is known."""
STARVING = ("memory", "files", "shm")
"""No more address space, open files, shared memory (and disk) for a while."""
FAULTS = ("kill", "stop", *STARVING)
ANY_PHASE = "any"


class Cell(NamedTuple):
    """role "client": a connection with requests in flight is cut.  "supervisor": it starves
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


def without_journal(cells: list[Cell], rng: random.Random) -> set[Cell]:
    """Those that are visited on a node without a journal: a third of the cells in which it
    matters."""
    matter = [cell for cell in cells if cell.role in ("router", "client", "gateway")]
    return set(rng.sample(matter, len(matter) // 3))


def together(left: list[Cell]) -> list[Cell]:
    """The first cell that is left, and others that can be visited with it: faults that need not
    know of each other, while requests are in the same phase."""
    chosen: list[Cell] = []
    for cell in left:
        if not chosen or _independent([*chosen, cell]):
            chosen.append(cell)
    return chosen


def count_visits(cells: list[Cell]) -> int:
    """That all cells take, where no phase is missed."""
    left, visits = list(cells), 0
    while left:
        chosen = together(left)
        left = [cell for cell in left if cell not in chosen]
        visits += 1
    return visits


def phase_of(cells: list[Cell]) -> str:
    """Of cells that are visited together."""
    return next((cell.phase for cell in cells if cell.phase != ANY_PHASE), ANY_PHASE)


def _independent(cells: list[Cell]) -> bool:
    """One process of each group, one of each kind beside them, and those that serve nobody."""
    roles = [cell.role for cell in cells if cell.role not in OF_A_GROUP]
    of_groups = len(cells) - len(roles)
    phases = {cell.phase for cell in cells} - {ANY_PHASE}
    if of_groups > 2 or len(set(roles)) < len(roles) or len(phases) > 1:
        return False
    if not set(roles) <= {*BESIDE, *ALONG}:
        return False
    if "ending" not in phases:
        return True
    # Who holds the last tokens of a group up keeps them from whoever is behind.
    if "client" in roles:
        return not of_groups and not {"tokenizer", "gateway"} & {*roles}
    return of_groups + ("gateway" in roles) <= 2


def _pairs(cell: Cell) -> set[tuple[str, str, str]]:
    return {
        ("role-phase", cell.role, cell.phase),
        ("role-fault", cell.role, cell.fault),
        ("phase-fault", cell.phase, cell.fault),
    }
