"""Prometheus' text of the router's status tree (docs/protocol.md): one request to the router.

Groups report their counters about once a second, so a scrape computes nothing
and no step waits for it.  What the tree does not have is left out: of a group its
"scheduler" until its first report, "stages", "latencies" and "finished".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4.encode()

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
    ("prompt_tokens", "prompt_tokens", "Prompt tokens computed."),
    ("generation_tokens", "generated_tokens", "Tokens generated."),
    ("engine_steps", "steps", "Steps of the model."),
)
_STAGE_TASKS = ("schedule", "input", "forward", "sample", "output")


def exposition(tree: dict[str, Any]) -> bytes:
    """The whole text."""
    return generate_latest(_Snapshot(tree))


class _Snapshot:
    """A tree as a Prometheus collector."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self._tree = tree
        self._model = tree["model"]["id"]
        self._groups: list[dict[str, Any]] = tree["groups"]

    def collect(self) -> Iterator[Metric]:
        yield from self._node()
        yield from self._schedulers()
        yield from self._stages()
        yield from self._latencies()

    def _node(self) -> Iterator[Metric]:
        requests = self._tree["requests"]
        ended = CounterMetricFamily(
            "albireo:request_success",
            "Requests that have ended without an error, by how.",
            labels=("model_name", "group", "finished_reason"),
        )
        for group in self._groups:
            for reason, count in (group.get("finished") or {}).items():
                ended.add_metric((*self._labels(group), reason), count)
        yield ended
        aborted = CounterMetricFamily(
            "albireo:request_cancelled", "Requests cancelled by clients.", labels=("model_name",)
        )
        aborted.add_metric((self._model,), requests["cancelled"])
        yield aborted
        finished = CounterMetricFamily(
            "albireo:request_finished", "Requests ended by stop or length.", labels=("model_name",)
        )
        finished.add_metric((self._model,), requests["finished"])
        yield finished
        failed = CounterMetricFamily(
            "albireo:request_failure", "Requests that ended with an error.", labels=("model_name",)
        )
        failed.add_metric((self._model,), requests["failed"])
        yield failed
        resumed = CounterMetricFamily(
            "albireo:request_failovers",
            "Times that a request went on elsewhere when its group died.",
            labels=("model_name",),
        )
        resumed.add_metric((self._model,), requests["failed_over"])
        yield resumed
        yield self._single("requests_in_flight", "Requests taken and not ended.",
                           requests["in_flight"])  # fmt: skip
        yield self._single("connections", "Clients of the router.", self._tree["connections"])
        up = self._gauge("group_up", "1 when the group is ready.")
        for group in self._groups:
            up.add_metric(self._labels(group), float(group["state"] == "ready"))
        yield up
        restarts = CounterMetricFamily(
            "albireo:process_restarts", "Restarts of each process.", labels=("actor",)
        )
        for actor in self._tree["actors"]:
            restarts.add_metric((actor["name"],), actor["restarts"])
        yield restarts

    def _schedulers(self) -> Iterator[Metric]:
        """Of the groups that have reported."""
        reports = [(g, g["scheduler"]) for g in self._groups if g["scheduler"] is not None]
        for name, field, text in _GAUGES:
            yield self._filled(self._gauge(name, text), field, reports)
        for name, field, text in _COUNTERS:
            counter = CounterMetricFamily(f"albireo:{name}", text, labels=("model_name", "group"))
            yield self._filled(counter, field, reports)
        for name, field, text in (
            ("step_time_mean_seconds", "step_ms_mean", "Mean time of recent steps."),
            ("forward_time_mean_seconds", "forward_ms_mean", "Mean of their forward passes."),
        ):
            gauge = self._gauge(name, text)
            for group, report in reports:
                gauge.add_metric(self._labels(group), report[field] / 1e3)
            yield gauge

    def _stages(self) -> Iterator[Metric]:
        """Times of the newest steps' tasks, from the timelines."""
        found = [(g, g["stages"]) for g in self._groups if g.get("stages") is not None]
        if not found:
            return
        mean = self._gauge("stage_time_mean_seconds", "Mean time of a task in a step.", "stage")
        late = self._gauge("stage_time_p99_seconds", "P99 of it.", "stage")
        exposed = self._gauge(
            "stage_exposed_mean_seconds", "Mean time the device waited for a task.", "stage"
        )
        for group, stages in found:
            for task in _STAGE_TASKS:
                labels = (*self._labels(group), task)
                mean.add_metric(labels, stages[task]["mean_us"] / 1e6)
                late.add_metric(labels, stages[task]["p99_us"] / 1e6)
                exposed.add_metric(labels, stages[task]["exposed_us"] / 1e6)
        yield mean
        yield late
        yield exposed
        for name, field, scale, text in (
            ("device_idle_mean_seconds", "idle_us_mean", 1e-6, "Mean idle time in a step."),
            ("serial_fraction", "serial_fraction", 1.0, "Share of a step without the forward."),
        ):
            gauge = self._gauge(name, text)
            for group, stages in found:
                gauge.add_metric(self._labels(group), stages[field] * scale)
            yield gauge

    def _latencies(self) -> Iterator[Metric]:
        """group["latencies"]: name -> {"bounds": [...], "counts": one more, "sum": seconds}."""
        names = dict.fromkeys(n for g in self._groups for n in g.get("latencies") or ())
        for name in names:
            family = HistogramMetricFamily(
                f"albireo:{name}", f"Distribution of {name.replace('_', ' ')}.",
                labels=("model_name", "group"),
            )  # fmt: skip
            for group in self._groups:
                found = (group.get("latencies") or {}).get(name)
                if found is not None:
                    family.add_metric(self._labels(group), _buckets(found), found["sum"])
            yield family

    def _filled(
        self, family: Any, field: str, reports: Iterable[tuple[dict[str, Any], dict[str, Any]]]
    ) -> Metric:
        for group, report in reports:
            if field in report:
                family.add_metric(self._labels(group), report[field])
        metric: Metric = family
        return metric

    def _gauge(self, name: str, text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"albireo:{name}", text, labels=("model_name", "group", *labels))

    def _single(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(f"albireo:{name}", text, labels=("model_name",))
        gauge.add_metric((self._model,), value)
        return gauge

    def _labels(self, group: dict[str, Any]) -> tuple[str, str]:
        return self._model, str(group["group"])


def _buckets(found: dict[str, Any]) -> list[tuple[str, float]]:
    """Cumulative counts by upper bound, as Prometheus wants them."""
    total = 0
    buckets = []
    for bound, count in zip((*found["bounds"], "+Inf"), found["counts"], strict=True):
        total += count
        buckets.append((str(bound), float(total)))
    return buckets
