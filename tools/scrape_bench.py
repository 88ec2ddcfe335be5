"""What a scrape of /metrics costs a node of two groups, and what steps feel of it.

    .venv/bin/python tools/scrape_bench.py [--requests 500] [--streams 16]

The sim device: its steps take the same time always, so what they take more is
the runtime's.  CPU time is the scheduler's own count for every thread of router
and gateway (/proc/PID/task/*/schedstat), less what they take without a scrape.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx2

from albireo.client import Client
from albireo.ipc.paths import node_dir
from albireo.node.events import Event, NodeReady
from albireo.node.launch import run_detached, stop_node
from albireo.node.options import NodeOptions
from albireo.trace.rows import NodeTimelines
from albireo.trace.stages import group_stages

NODE = "scraped"
STEP_MS = 5.0
PAUSE_S = 1.1  # stages are summed up at most once a second
PHASE_S = 8.0
ROLES = ("router", "gateway0")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--streams", type=int, default=16)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="albireo-scrape-") as scratch:
        os.environ["ALBIREO_RUNTIME_DIR"] = f"{scratch}/run"
        os.environ["ALBIREO_STATE_DIR"] = f"{scratch}/state"
        events: list[Event] = []
        options = NodeOptions(
            name=NODE, device="sim", sim_step_ms=STEP_MS, groups=(1, 1), http="127.0.0.1:0"
        )
        if run_detached(options, events.append) != 0:
            print(events, file=sys.stderr)
            return 1
        ready = next(each for each in events if isinstance(each, NodeReady))
        try:
            with Client.connect(node=NODE) as client:
                measure(client, f"{ready.facts['http']}/metrics", given.requests, given.streams)
        finally:
            stop_node(NODE, now=True, timeout_s=20)
    return 0


def measure(client: Client, url: str, requests: int, streams: int) -> None:
    pids = {each["name"]: each["pid"] for each in client.status()["actors"]}
    for first in range(0, requests, 50):
        running = [client.stream([1, 2, 3 + n], max_tokens=8) for n in range(first, first + 50)]
        for each in running:
            list(each)
    with httpx2.Client() as scraper:
        scraper.get(url)
        report(f"idle, after {requests} requests", pids, lambda: scraper.get(url))
        stopping = threading.Event()
        serving = [
            threading.Thread(target=serve, args=(client, number, stopping))
            for number in range(streams)
        ]
        for thread in serving:
            thread.start()
        time.sleep(2.0)
        for scrapes_a_second in (0, 2, 0, 2):
            phase(pids, scraper, url, scrapes_a_second)
        stopping.set()
        for thread in serving:
            thread.join()


def report(what: str, pids: dict[str, int], scrape: Any) -> None:
    walls, costs = [], []
    for _ in range(8):
        time.sleep(PAUSE_S)
        before, began = cpu_ms(pids), time.perf_counter()
        answer = scrape()
        walls.append((time.perf_counter() - began) * 1e3)
        time.sleep(0.02)
        costs.append(sum(cpu_ms(pids).values()) - sum(before.values()))
    print(
        f"{what}: {len(answer.content) / 1024:.0f} KiB, CPU of router and gateway a scrape "
        f"{min(costs):.1f} ms at best, {statistics.median(costs):.1f} median; answer after "
        f"{min(walls):.1f} ms at best, {statistics.median(walls):.1f} median"
    )


def phase(pids: dict[str, int], scraper: httpx2.Client, url: str, scrapes_a_second: int) -> None:
    """Steps of a few seconds, and what router and gateway took."""
    before, began, scrapes = cpu_ms(pids), time.monotonic_ns(), 0
    until = time.monotonic() + PHASE_S
    while time.monotonic() < until:
        if scrapes_a_second:
            scraper.get(url)
            scrapes += 1
        time.sleep(1 / (scrapes_a_second or 2))
    ended = time.monotonic_ns()
    took = {name: (after - before[name]) / PHASE_S for name, after in cpu_ms(pids).items()}
    timelines = NodeTimelines(node_dir(NODE))
    for group in range(2):
        stats = group_stages(timelines.group(group), 10**6, (began, ended))
        assert stats is not None
        print(
            f"{scrapes} scrapes in {PHASE_S:g} s, group {group}: {stats.steps} steps of "
            f"{stats.step_us_mean:,.0f} us (median {stats.step_us_median:,.0f}, "
            f"P99 {stats.step_us_p99:,.0f}), device idle {stats.idle_us_mean:.1f} us a step"
        )
    print("  CPU, ms a second: " + ", ".join(f"{n} {ms:.0f}" for n, ms in took.items()))


def serve(client: Client, number: int, stopping: threading.Event) -> None:
    while not stopping.is_set():
        for _ in client.stream([5, 6, number], max_tokens=400, ignore_eos=True):
            if stopping.is_set():
                return


def cpu_ms(pids: dict[str, int]) -> dict[str, float]:
    return {
        name: sum(
            int((task / "schedstat").read_text().split()[0])
            for task in Path(f"/proc/{pids[name]}/task").iterdir()
        )
        / 1e6
        for name in ROLES
    }


if __name__ == "__main__":
    sys.exit(main())
