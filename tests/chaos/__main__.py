"""python -m tests.chaos [--minutes 10] [--seed N] [--model demo]: see the package."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import secrets
import statistics
import sys
import time

from .checks import Report
from .full import enter, is_small
from .node import STEP_TIMEOUT_S, model_path
from .plan import ANY_PHASE, PHASES, all_cells, in_order, pairwise
from .run import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="that it may take")
    parser.add_argument("--seed", type=int, help="of an earlier run, to repeat it")
    parser.add_argument("--model", default="demo", metavar="DIR|FILE.gguf|demo")
    parser.add_argument(
        "--pairwise", action="store_true", help="a selection of cells in which every pair occurs"
    )
    parser.add_argument(
        "--any-pace",
        action="store_true",
        help="a cell that stays empty is said, and is no failure: where nobody knows how fast the "
        "machine is",
    )
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    began = time.monotonic()
    model = model_path(given.model)
    enter()
    seed = secrets.randbelow(1 << 31) if given.seed is None else given.seed
    full = "filled for real" if is_small() else "simulated by a limit: no mount namespace here"
    print(f"seed {seed}, step time-out {STEP_TIMEOUT_S:g} s, /dev/shm {full}", flush=True)
    rng = random.Random(seed)
    cells = pairwise(all_cells(), rng) if given.pairwise else in_order(all_cells(), rng)
    until = began + given.minutes * 60
    again = not given.pairwise
    report = asyncio.run(
        run(cells, model, seed, until, again, lambda text: print(text, flush=True))
    )
    figures = _figures(report, len(cells), time.monotonic() - began) | {"dev_shm": full}
    empty = [cell for cell in cells if cell not in report.visited]
    failed = [visit for visit in report.visits if visit.why is not None]
    if given.json:
        print(json.dumps(figures, indent=2))
    else:
        _show(report, figures)
    for cell in empty:
        print(f"EMPTY: {'/'.join(cell)}")
    for text in report.wrong[:20]:
        print(f"WRONG: {text}")
    for visit in failed:
        print(f"FAILED: {', '.join('/'.join(cell) for cell in visit.struck)}: {visit.why}")
    print(f"{len(report.wrong) + len(failed)} violations, {len(empty)} empty cells, seed {seed}")
    sys.exit(1 if report.wrong or failed or (empty and not given.any_pace) else 0)


def _figures(report: Report, cells: int, seconds: float) -> dict[str, object]:
    pauses = {
        fault: {
            "streams": len(found),
            "p50_ms": round(statistics.median(found), 1),
            "p99_ms": round(sorted(found)[int(len(found) * 0.99)], 1),
        }
        for fault, found in sorted(report.pauses_ms.items())
    }
    struck = [(visit, cell) for visit in report.visits for cell in visit.struck]
    return {
        "cells": cells,
        "filled": len(report.visited),
        "seconds": round(seconds, 1),
        "faults": len(struck),
        "survived": sum(visit.why is None for visit, _ in struck),
        "phase_not_sure": sum(cell not in visit.cells for visit, cell in struck),
        "requests": dict(report.counts),
        "tokens_lost": report.counts["tokens lost"],
        "tokens_repeated_or_changed": report.counts["streams changed"],
        "pauses": pauses,
    }


def _show(report: Report, figures: dict[str, object]) -> None:
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):28} {value}")
    struck = [(cell, visit) for visit in report.visits for cell in visit.cells]
    faults = sorted({cell.fault for cell, _ in struck})
    print("\n+ with a journal, - without one, ! not survived")
    print(f"{'role':12} {'phase':8} " + " ".join(f"{fault:10}" for fault in faults))
    for role in sorted({cell.role for cell, _ in struck}):
        for phase in (*PHASES, ANY_PHASE):
            marks = [
                "".join(
                    "!" if visit.why else "+" if visit.journal else "-"
                    for cell, visit in struck
                    if cell == (role, phase, fault)
                )
                for fault in faults
            ]
            if any(marks):
                print(f"{role:12} {phase:8} " + " ".join(f"{mark:10}" for mark in marks))


if __name__ == "__main__":
    main()
