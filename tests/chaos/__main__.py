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

from .plan import ANY_PHASE, PHASES, all_cells, in_order, pairwise
from .run import Report, model_path, run, step_timeout_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="of an earlier run, to repeat it")
    parser.add_argument("--model", default="demo", metavar="DIR|FILE.gguf|demo")
    parser.add_argument(
        "--pairwise", action="store_true", help="a selection of cells in which every pair occurs"
    )
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    seed = secrets.randbelow(1 << 31) if given.seed is None else given.seed
    print(f"seed {seed}, step time-out {step_timeout_s():.1f} s", flush=True)
    rng = random.Random(seed)
    cells = pairwise(all_cells(), rng) if given.pairwise else in_order(all_cells(), rng)
    until = time.monotonic() + given.minutes * 60
    report = asyncio.run(
        run(cells, model_path(given.model), seed, until, lambda text: print(text, flush=True))
    )
    visited = {visit.cell for visit in report.visits if visit.why is None}
    empty = [cell for cell in cells if cell not in visited]
    failed = [visit for visit in report.visits if visit.why is not None]
    print(json.dumps(_figures(report, len(cells)), indent=2) if given.json else "")
    if not given.json:
        _show(report, len(cells))
    for cell in empty:
        print(f"not visited: {'/'.join(cell)}")
    for text in report.wrong[:20]:
        print(f"WRONG: {text}")
    for visit in failed:
        print(f"FAILED: {'/'.join(visit.cell)}: {visit.why}")
    print(f"{len(report.wrong) + len(failed)} violations, {len(empty)} empty cells, seed {seed}")
    # A selection is for a busy machine: it has to come as far as it can.
    incomplete = len(empty) > (len(cells) // 2 if given.pairwise else 0)
    sys.exit(1 if report.wrong or failed or incomplete else 0)


def _figures(report: Report, cells: int) -> dict[str, object]:
    pauses = {
        fault: {
            "streams": len(found),
            "p50_ms": round(statistics.median(found), 1),
            "p99_ms": round(sorted(found)[int(len(found) * 0.99)], 1),
        }
        for fault, found in sorted(report.pauses_ms.items())
    }
    survived = sum(visit.why is None for visit in report.visits)
    return {
        "cells": cells,
        "faults": len(report.visits),
        "survived": survived,
        "requests": dict(report.counts),
        "tokens_lost": report.counts["tokens lost"],
        "tokens_repeated_or_changed": report.counts["streams changed"],
        "pauses": pauses,
    }


def _show(report: Report, cells: int) -> None:
    figures = _figures(report, cells)
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):28} {value}")
    faults = sorted({visit.cell.fault for visit in report.visits})
    roles = list(dict.fromkeys(visit.cell.role for visit in report.visits))
    print(f"\n{'role':12} {'phase':8} " + " ".join(f"{fault:10}" for fault in faults))
    for role in sorted(roles):
        for phase in (*PHASES, ANY_PHASE):
            marks = [
                "".join(
                    "+" if visit.why is None else "!"
                    for visit in report.visits
                    if visit.cell == (role, phase, fault)
                )
                for fault in faults
            ]
            if any(marks):
                print(f"{role:12} {phase:8} " + " ".join(f"{mark:10}" for mark in marks))


if __name__ == "__main__":
    main()
