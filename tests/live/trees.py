"""Status trees as a router makes them, with what a test cares about."""

from __future__ import annotations

from typing import Any

from albireo.ipc.histogram import WHOLE_REQUEST_S, Histogram
from albireo.live.history import Sample
from albireo.live.machine import GpuReading
from albireo.router.latencies import GroupLatencies, StreamTimes
from albireo.router.status import QUEUE_TIME

TASKS = ("schedule", "input", "forward", "sample", "output")


def stages() -> dict[str, Any]:
    """Of steps of 1 ms: 900 us forward, 80 us sampling, 20 us idle."""
    times = {"schedule": (35.0, 5.0), "input": (5.0, 4.0), "forward": (900.0, 900.0),
             "sample": (80.0, 80.0), "output": (28.0, 8.0)}  # fmt: skip
    return {
        "steps": 100, "step_us_mean": 1000.0, "step_us_median": 1000.0, "step_us_p99": 1100.0,
        "idle_us_mean": 20.0, "idle_us_p99": 30.0, "serial_fraction": 0.1, "planned_ahead": 1.0,
        "other_exposed_us": 3.0,
    } | {
        task: {"mean_us": mean, "p99_us": mean, "exposed_us": exposed}
        for task, (mean, exposed) in times.items()
    }  # fmt: skip


def scheduler(**fields: Any) -> dict[str, Any]:
    return {
        "running": 3, "waiting": 1, "kv_blocks_used": 5, "kv_blocks_total": 10,
        "kv_tokens_total": 160, "kv_usage": 0.5, "preemptions": 2, "prefix_queried_tokens": 0,
        "prefix_hit_tokens": 0, "swapped_out_blocks": 0, "swapped_in_blocks": 0, "steps": 100,
        "prompt_tokens": 40, "generated_tokens": 60, "requests_finished": 7, "step_ms_mean": 10.0,
        "forward_ms_mean": 9.0,
    } | fields  # fmt: skip


def group(
    number: int = 0, *, tokens: int = 0, answers: int = 0, **fields: Any
) -> dict[str, Any]:  # fmt: skip
    """tokens: handed to clients since the router started, the first 100 ms after its arrival, the
    others 20 ms apart."""
    latencies, times = GroupLatencies(), StreamTimes(0.0)
    for place in range(tokens):
        latencies.tokens(times, 1, 0.1 + 0.02 * place)
        latencies.batch(1, more=False)
    for _ in range(answers):
        latencies.end(times, "stop", 1.0)
    return {
        "group": number, "state": "ready", "in_flight": 3, "outstanding_tokens": 0,
        "found_tokens": 0, "scheduler": scheduler(), "stages": stages(),
        "finished": dict(latencies.finished),
        "latencies": latencies.tree() | {QUEUE_TIME: Histogram(WHOLE_REQUEST_S).tree()},
        "gpus": [],
    } | fields  # fmt: skip


def tree(*groups: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "node": "n", "version": "1.2.3", "protocol": 1,
        "model": {"id": "m", "architecture": "Llama", "parameters": 135_000_000,
                  "vocab_size": 1000, "max_model_len": 100, "device": "cpu", "dtype": "bfloat16"},
        "uptime_s": 10.0, "draining": False, "connections": 2,
        "requests": {"in_flight": 4, "tokenizing": 1, "waiting_for_group": 0,
                     "waiting_for_readmission": 0, "waiting_for_client": 0, "finished": 7,
                     "cancelled": 1, "failed": 2, "failed_over": 1, "resumed": 0},
        "actors": [actor("router", pid=10), actor("g0.worker0", pid=11, group=0, threads=2)],
        "groups": list(groups),
    } | fields  # fmt: skip


def actor(name: str, pid: int, group: int | None = None, threads: int = 1) -> dict[str, Any]:
    role = name.rpartition(".")[2].rstrip("0123456789")
    return {"name": name, "role": role, "group": group, "pid": pid, "state": "ready",
            "restarts": 0, "threads": threads}  # fmt: skip


def sample(
    at_s: float, *groups: dict[str, Any], cpu_s: dict[str, float] | None = None,
    gpus: dict[str, GpuReading] | None = None, **fields: Any,
) -> Sample:  # fmt: skip
    return Sample(at_s, tree(*groups, **{"uptime_s": at_s, **fields}), cpu_s or {}, gpus or {})
