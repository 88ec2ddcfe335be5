"""The tree that answers a status request, and that `albireo node status --json` prints.

docs/protocol.md describes it for readers in other languages; keep the two
together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import msgspec

from albireo._version import __version__
from albireo.ipc.config import ActorSpec, EngineConfig
from albireo.ipc.histogram import WHOLE_REQUEST_S, Histogram
from albireo.ipc.messages import ActorInfo, SchedulerStats
from albireo.ipc.protocol import PROTOCOL_VERSION

from .groups import Group

QUEUE_TIME = "request_queue_time_seconds"


class RequestCounts(msgspec.Struct, kw_only=True):
    """Answers of this router since it started, and now: a request with n > 1 has n.

    tokenizing and waiting_for_group are stages of those in flight; the rest of
    them runs on a group.  waiting_for_readmission: those of waiting_for_group whose
    group has died.  waiting_for_client: requests, not in flight, whose connection
    is over.
    """

    in_flight: int = 0
    tokenizing: int = 0
    waiting_for_group: int = 0
    waiting_for_readmission: int = 0
    waiting_for_client: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    failed_over: int = 0
    resumed: int = 0


def status_tree(
    spec: ActorSpec,
    *,
    uptime_s: float,
    draining: bool,
    connections: int,
    requests: RequestCounts,
    readmissions_s: Collection[float],
    actors: Iterable[ActorInfo],
    groups: Iterable[Group],
    stages: Sequence[dict[str, Any] | None],
) -> dict[str, Any]:
    """Plain maps, lists, numbers and strings."""
    engine = spec.engine
    return {
        "node": spec.node,
        "version": __version__,
        "protocol": PROTOCOL_VERSION,
        "model": {
            "id": spec.model.name,
            "architecture": spec.model.architecture,
            "parameters": spec.model.num_params,
            "vocab_size": spec.model.vocab_size,
            "max_model_len": engine.max_model_len,
            "device": engine.device,
            "dtype": engine.dtype,
            "e4m7_weights": engine.e4m7_weights,
            "kv_cache_dtype": _kv_cache_dtype(engine),
        },
        "uptime_s": round(uptime_s, 1),
        "draining": draining,
        "connections": connections,
        "requests": msgspec.structs.asdict(requests),
        "readmission_ms": _readmission(readmissions_s),
        "actors": [_actor(actor) for actor in actors],
        "groups": [
            _group(group, engine.block_size, stages[group.number], gpus)
            for group, gpus in zip(groups, _gpus(spec), strict=True)
        ],
    }


def _kv_cache_dtype(engine: EngineConfig) -> str:
    return engine.dtype if engine.kv_cache_dtype == "model" else engine.kv_cache_dtype


def _gpus(spec: ActorSpec) -> list[list[str]]:
    """UUIDs of each group's GPUs, by rank."""
    return [list(gpus) for gpus in spec.group_gpus] or [[]] * spec.num_groups


def _readmission(seconds: Collection[float]) -> dict[str, float]:
    """Of the last streams whose group died."""
    found = sorted(seconds) or [0.0]
    return {
        "count": len(seconds),
        "p50": round(found[len(found) // 2] * 1e3, 3),
        "p99": round(found[int(len(found) * 0.99)] * 1e3, 3),
        "max": round(found[-1] * 1e3, 3),
    }


def _actor(actor: ActorInfo) -> dict[str, Any]:
    fields = msgspec.structs.asdict(actor)
    if actor.group < 0:
        fields["group"] = None
    return fields


def _group(
    group: Group, block_size: int, stages: dict[str, Any] | None, gpus: list[str]
) -> dict[str, Any]:
    """State as the router has it; `scheduler` is null until its first report, `stages` until there
    are steps."""
    stats = group.stats
    return {
        "group": group.number,
        "state": group.state,
        "in_flight": len(group.streams),
        "outstanding_tokens": group.outstanding_tokens,
        "found_tokens": group.found_tokens,
        "scheduler": None
        if stats is None
        else {
            "running": stats.running,
            "waiting": stats.waiting,
            "kv_blocks_used": stats.kv_blocks_used,
            "kv_blocks_total": stats.kv_blocks_total,
            "kv_tokens_total": stats.kv_blocks_total * block_size,
            "kv_usage": round(stats.kv_blocks_used / max(1, stats.kv_blocks_total), 4),
            "preemptions": stats.preemptions,
            "prefix_queried_tokens": stats.prefix_queried_tokens,
            "prefix_hit_tokens": stats.prefix_hit_tokens,
            "swapped_out_blocks": stats.swapped_out_blocks,
            "swapped_in_blocks": stats.swapped_in_blocks,
            "steps": stats.steps,
            "prompt_tokens": stats.prompt_tokens,
            "generated_tokens": stats.generated_tokens,
            "requests_finished": stats.finished,
            "step_ms_mean": round(stats.step_ms_mean, 3),
            "forward_ms_mean": round(stats.forward_ms_mean, 3),
        },
        "stages": stages,
        "finished": group.latencies.finished,
        "latencies": group.latencies.tree() | {QUEUE_TIME: _queue_times(stats)},
        "gpus": gpus,
    }


def _queue_times(stats: SchedulerStats | None) -> dict[str, Any]:
    histogram = Histogram(WHOLE_REQUEST_S)
    if stats is not None and stats.queue_counts:
        histogram.counts, histogram.total = stats.queue_counts, stats.queue_sum_s
    return histogram.tree()
