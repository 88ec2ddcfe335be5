"""What a step costs the scheduler: median times of plan, write_plan and apply.

Plain decodes at several batch sizes, two steps in flight, on one core; every
sequence is at its own place in its blocks, so that some cross a block's end in
each step, as in real work.  Prints a table, or one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from albireo.ipc.config import LOOKAHEAD
from albireo.ipc.messages import Submit
from albireo.ipc.plan import ROW_WORDS, plan_bytes, write_plan
from albireo.scheduler.limits import Limits
from albireo.scheduler.scheduler import Scheduler

PROMPT_LEN = 64
BLOCK_SIZE = 16
MAX_MODEL_LEN = 8192


def submission(request: int, max_tokens: int) -> Submit:
    """A request with one stop token, which never comes."""
    return Submit(
        request=request,
        prompt_ids=[request] * (PROMPT_LEN + request % BLOCK_SIZE),
        max_tokens=max_tokens,
        min_tokens=0,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        seed=request,
        stop=(),
        stop_token_ids=(2,),
        include_stop=False,
        skip_special_tokens=True,
    )


def measure(batch: int, steps: int) -> dict[str, float]:
    """Median microseconds of a step's parts with `batch` running decodes."""
    length = PROMPT_LEN + BLOCK_SIZE + steps + 64
    limits = Limits(
        max_num_seqs=batch,
        max_num_batched_tokens=max(8192, batch),
        max_model_len=max(MAX_MODEL_LEN, length),
        block_size=BLOCK_SIZE,
        num_blocks=batch * (length // BLOCK_SIZE + 2),
        lookahead=LOOKAHEAD,
    )
    scheduler = Scheduler(limits)
    for request in range(1, batch + 1):
        scheduler.submit(submission(request, steps + 32))
    nbytes = plan_bytes(batch, limits.max_num_batched_tokens, BLOCK_SIZE, limits.max_model_len)
    frame = memoryview(bytearray(nbytes))
    planned: list[np.ndarray] = []
    times: dict[str, list[int]] = {"plan_us": [], "write_us": [], "apply_us": []}

    def plan() -> bool:
        begin = time.perf_counter_ns()
        plan = scheduler.plan()
        middle = time.perf_counter_ns()
        if plan is None:
            return False
        write_plan(frame, plan.step, 0, plan.sections)
        end = time.perf_counter_ns()
        if len(plan.sections.decode) == batch:
            times["plan_us"].append(middle - begin)
            times["write_us"].append(end - middle)
        rows = np.empty((len(plan.sampled), ROW_WORDS), dtype=np.int32)
        rows[:, 0] = plan.sampled
        rows[:, 1] = 1
        rows[:, 2] = 7
        planned.append(rows)
        return True

    step = 0
    while len(times["apply_us"]) < steps:
        while plan():
            pass
        step += 1
        rows = planned.pop(0)
        begin = time.perf_counter_ns()
        scheduler.apply(step, rows)
        if len(rows) == batch:
            times["apply_us"].append(time.perf_counter_ns() - begin)
    medians = {name: statistics.median(values) / 1000 for name, values in times.items()}
    return medians | {"sum_us": sum(medians.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", default="1,64,256,1024", help="running decodes, with commas")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = {int(batch): measure(int(batch), arguments.steps)
               for batch in arguments.batch.split(",")}  # fmt: skip
    if arguments.json:
        print(json.dumps({"steps": arguments.steps, "block_size": BLOCK_SIZE, "batch": results}))
        return
    print(f"{'batch':>6} {'plan us':>9} {'write us':>9} {'apply us':>9} {'sum us':>9}")
    for batch, medians in results.items():
        print(f"{batch:6} " + " ".join(f"{value:9.1f}" for value in medians.values()))


if __name__ == "__main__":
    main()
