"""Prometheus' metrics of a sample (albireo/live/): the router's status tree, NVML and /proc.

Groups report their counters about once a second, so no step waits for a scrape.
What is not known is left out: of a group its "scheduler" until its first report,
"stages", "latencies", "finished", and GPUs where there are none.
docs/live.md lists the names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from albireo.live.history import Sample

from .exposition import Exposition, labels

_GAUGES = (
    ("num_requests_running", "running", "Requests that have a slot."),
    ("num_requests_waiting", "waiting", "Requests that wait for a slot."),
    ("kv_cache_usage_perc", "kv_usage", "Share of the KV blocks in use, 0 to 1."),
    ("kv_cache_blocks", "kv_blocks_total", "KV blocks of the group."),
)
_COUNTERS = (
    ("num_preemptions", "preemptions", "Sequences preempted for others."),
    ("prefix_cache_queries", "prefix_queried_tokens", "Prompt tokens looked up in the cache."),
    ("prefix_cache_hits", "prefix_hit_tokens", "Prompt tokens found in the cache."),
    ("swapped_out_blocks", "swapped_out_blocks", "KV blocks moved to host memory."),
    ("swapped_in_blocks", "swapped_in_blocks", "KV blocks moved back from host memory."),
    ("prompt_tokens", "prompt_tokens", "Prompt tokens of requests that got a slot."),
    ("generation_tokens", "generated_tokens", "Tokens generated."),
    ("engine_steps", "steps", "Steps of the model."),
)
_MEANS_MS = (
    ("step_time_mean_seconds", "step_ms_mean", "Mean time of recent steps."),
    ("forward_time_mean_seconds", "forward_ms_mean", "Mean of their forward passes."),
)
_REQUESTS = (
    ("request_cancelled", "cancelled", "Requests cancelled by clients."),
    ("request_finished", "finished", "Requests ended by stop or length."),
    ("request_failure", "failed", "Requests that ended with an error."),
    ("request_failovers", "failed_over", "Times that a request went on when its group died."),
    ("request_resumed", "resumed", "Requests that went on when their client was back."),
)
_REQUESTS_NOW = (
    ("requests_in_flight", "in_flight", "Requests taken, not ended."),
    ("requests_waiting_for_group", "waiting_for_group", "Of these: no group has room or is ready."),
    (
        "requests_waiting_for_readmission", "waiting_for_readmission",
        "Of those: their group has died, and none has taken them yet.",
    ),
    (
        "requests_waiting_for_client", "waiting_for_client",
        "Not in flight: their connection is over, and they wait for the next one.",
    ),
)  # fmt: skip
_NONE_FINISHED = {"stop": 0, "length": 0}
"""Said before there are any: a rate over a counter that is not there yet misses its first ones."""
_STAGE_TASKS = ("schedule", "input", "forward", "sample", "output")
_GPU_GAUGES = (
    ("gpu_power_watts", "power_w", "Power of the moment."),
    ("gpu_utilization_ratio", "utilization", "Share of the time in which a kernel ran, 0 to 1."),
    ("gpu_memory_used_bytes", "memory_used_bytes", "Memory in use, by whomever."),
    ("gpu_temperature_celsius", "temperature_c", "Temperature of the GPU."),
)


def exposition(sample: Sample, j_per_token: Mapping[int, float]) -> bytes:
    """The whole text.  j_per_token: of the last seconds, by the groups' numbers."""
    out = Exposition()
    tree = sample.tree
    model = tree["model"]["id"]
    groups = [
        (labels(model_name=model, group=str(group["group"])), group) for group in tree["groups"]
    ]
    _node(out, tree, labels(model_name=model), groups)
    _schedulers(out, groups)
    _stages(out, groups)
    _latencies(out, groups)
    _processes(out, sample)
    _gpus(out, sample, groups, j_per_token)
    return out.text()


_Groups = list[tuple[str, dict[str, Any]]]
"""Labels and tree of each group."""


def _node(out: Exposition, tree: dict[str, Any], model: str, groups: _Groups) -> None:
    requests = tree["requests"]
    out.counter(
        "request_success",
        "Requests that have ended without an error, by how.",
        (
            (f"{label},{labels(finished_reason=reason)}", count)
            for label, group in groups
            for reason, count in (_NONE_FINISHED | (group.get("finished") or {})).items()
        ),
    )
    for name, field, text in _REQUESTS:
        out.counter(name, text, [(model, requests[field])])
    for name, field, text in _REQUESTS_NOW:
        out.gauge(name, text, [(model, requests[field])])
    out.gauge("connections", "Clients of the router.", [(model, tree["connections"])])
    out.gauge(
        "group_up", "1 when the group is ready.",
        ((label, group["state"] == "ready") for label, group in groups),
    )  # fmt: skip


def _schedulers(out: Exposition, groups: _Groups) -> None:
    """Of the groups that have reported."""
    found = [(label, group["scheduler"]) for label, group in groups if group["scheduler"]]

    def values(field: str) -> Iterator[tuple[str, float]]:
        return ((label, report[field]) for label, report in found if field in report)

    for name, field, text in _GAUGES:
        out.gauge(name, text, values(field))
    for name, field, text in _COUNTERS:
        out.counter(name, text, values(field))
    for name, field, text in _MEANS_MS:
        out.gauge(name, text, ((label, ms / 1e3) for label, ms in values(field)))


def _stages(out: Exposition, groups: _Groups) -> None:
    """Times of the newest steps' tasks, from the timelines."""
    found = [(label, group["stages"]) for label, group in groups if group.get("stages")]

    def tasks(field: str) -> Iterator[tuple[str, float]]:
        return (
            (f'{label},stage="{task}"', stages[task][field] / 1e6)
            for label, stages in found
            for task in _STAGE_TASKS
        )

    out.gauge("stage_time_mean_seconds", "Mean time of a task in a step.", tasks("mean_us"))
    out.gauge("stage_time_p99_seconds", "P99 of it.", tasks("p99_us"))
    out.gauge(
        "stage_exposed_mean_seconds", "Mean time the device waited for a task.",
        tasks("exposed_us"),
    )  # fmt: skip
    out.gauge(
        "device_idle_mean_seconds", "Mean idle time of the device in a step.",
        ((label, stages["idle_us_mean"] / 1e6) for label, stages in found),
    )  # fmt: skip
    out.gauge(
        "serial_fraction", "Share of a step without the forward pass.",
        ((label, stages["serial_fraction"]) for label, stages in found),
    )  # fmt: skip


def _latencies(out: Exposition, groups: _Groups) -> None:
    for name in dict.fromkeys(name for _, group in groups for name in group.get("latencies") or ()):
        out.histogram(
            name, f"Distribution of {name.replace('_', ' ')}.",
            (
                (label, group["latencies"][name])
                for label, group in groups
                if name in (group.get("latencies") or ())
            ),
        )  # fmt: skip


def _processes(out: Exposition, sample: Sample) -> None:
    out.counter(
        "process_restarts", "Restarts of each process.",
        ((labels(actor=each["name"]), each["restarts"]) for each in sample.tree["actors"]),
    )  # fmt: skip
    out.counter(
        "process_cpu_seconds", "User and system time of each process.",
        ((labels(actor=name), seconds) for name, seconds in sample.cpu_s.items()),
    )  # fmt: skip


def _gpus(
    out: Exposition, sample: Sample, groups: _Groups, j_per_token: Mapping[int, float]
) -> None:
    """As NVML says; nothing on a node without GPUs."""
    found = [
        (f"{label},{labels(gpu=uuid)}", sample.gpus[uuid])
        for label, group in groups
        for uuid in group.get("gpus") or ()
        if uuid in sample.gpus
    ]

    def values(field: str) -> Iterator[tuple[str, float]]:
        pairs = ((label, getattr(reading, field)) for label, reading in found)
        return ((label, value) for label, value in pairs if value is not None)

    for name, field, text in _GPU_GAUGES:
        out.gauge(name, text, values(field))
    out.counter("gpu_energy_joules", "Energy since the driver was loaded.", values("energy_j"))
    out.gauge(
        "energy_per_token_joules", "Of a group's GPUs, in the last seconds.",
        (
            (label, j_per_token[group["group"]])
            for label, group in groups
            if group["group"] in j_per_token
        ),
    )  # fmt: skip
