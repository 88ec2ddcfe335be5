"""What there is to see of a node at a moment, made of the samples before it.

These types are what `GET /top` answers and what `albireo top --json` prints
(docs/live.md lists the fields); None is what cannot be known, never 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from .history import KEPT_S, RATE_S, History, Sample, grown
from .machine import GpuReading
from .percentiles import Percentiles, gained, percentiles

_TTFT = "time_to_first_token_seconds"
_ITL = "inter_token_latency_seconds"
_TOKENS = "iteration_tokens_total"


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Of the last seconds.  Latencies: of the last half minute; None = no tokens came.

    tokens_per_s: handed to clients.  prompt_tokens_per_s: computed, not found in the cache.
    """

    tokens_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    answers_per_s: float | None = None
    ttft: Percentiles | None = None
    itl: Percentiles | None = None


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """Of all GPUs of a group: the mean power of the last seconds, and what a token took of it."""

    power_w: float
    j_per_token: float | None


class GroupPicture(msgspec.Struct, frozen=True, kw_only=True):
    """running, waiting, kv_*: as the scheduler has last said, None before it has.

    in_flight: requests that the router has given to the group.
    prefix_hit_rate: share of the prompt tokens of the last half minute that were in the cache.
    stages: of the newest steps, as in the status tree (docs/protocol.md).
    gpus, energy: empty and None where there is no GPU, or NVML does not tell.
    """

    group: int
    state: str
    in_flight: int
    running: int | None
    waiting: int | None
    kv_usage: float | None
    kv_tokens_total: int | None
    preemptions: int | None
    prefix_hit_rate: float | None
    rates: Rates
    stages: dict[str, Any] | None
    gpus: list[GpuReading]
    energy: Energy | None


class ActorPicture(msgspec.Struct, frozen=True, kw_only=True):
    """cpu: cores' worth of CPU time in the last seconds; None until it is known."""

    name: str
    role: str
    group: int | None
    pid: int
    state: str
    restarts: int
    threads: int
    cpu: float | None


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """span_s: that the rates are of.  no_gpu: why nothing is said of GPUs, "" where it is."""

    node: str
    version: str
    model: dict[str, Any]
    uptime_s: float
    draining: bool
    connections: int
    requests: dict[str, int]
    span_s: float
    rates: Rates
    energy: Energy | None
    no_gpu: str
    groups: list[GroupPicture]
    actors: list[ActorPicture]


def picture(history: History, no_gpu: str = "") -> Picture:
    """Of the newest sample.  no_gpu: why NVML was not asked, or did not answer."""
    new, old, older = history.newest, history.before(RATE_S), history.before(KEPT_S)
    tree = new.tree
    span_s = 0.0 if old is None else new.at_s - old.at_s
    groups = [_group(each, new, old, older, span_s) for each in tree["groups"]]
    if not any(each.get("gpus") for each in tree["groups"]):
        device = tree["model"]["device"]
        no_gpu = f"the {device} device has no GPU: no utilisation, power or energy"
    return Picture(
        node=tree["node"],
        version=tree["version"],
        model=tree["model"],
        uptime_s=tree["uptime_s"],
        draining=tree["draining"],
        connections=tree["connections"],
        requests=tree["requests"],
        span_s=round(span_s, 3),
        rates=_rates(tree["groups"], old, older, span_s),
        energy=_energy(tree["groups"], new, old, span_s),
        no_gpu=no_gpu,
        groups=groups,
        actors=[_actor(each, new, old, span_s) for each in tree["actors"]],
    )


def energy_of(history: History, group: int) -> Energy | None:
    """Of one group, by its number."""
    new, old = history.newest, history.before(RATE_S)
    found = [each for each in new.tree["groups"] if each["group"] == group]
    return _energy(found, new, old, 0.0 if old is None else new.at_s - old.at_s)


def _group(
    group: dict[str, Any], new: Sample, old: Sample | None, older: Sample | None, span_s: float
) -> GroupPicture:
    stats = group["scheduler"] or {}
    return GroupPicture(
        group=group["group"],
        state=group["state"],
        in_flight=group["in_flight"],
        running=stats.get("running"),
        waiting=stats.get("waiting"),
        kv_usage=stats.get("kv_usage"),
        kv_tokens_total=stats.get("kv_tokens_total"),
        preemptions=stats.get("preemptions"),
        prefix_hit_rate=_hit_rate(group, older),
        rates=_rates([group], old, older, span_s),
        stages=group["stages"],
        gpus=[new.gpus[uuid] for uuid in group.get("gpus", ()) if uuid in new.gpus],
        energy=_energy([group], new, old, span_s),
    )


def _rates(
    groups: Sequence[dict[str, Any]], old: Sample | None, older: Sample | None, span_s: float
) -> Rates:
    """Of these groups together."""
    if old is None or span_s <= 0:
        return Rates()
    finished = prompt = 0.0
    for group in groups:
        before = _same_group(old, group)
        finished += grown(sum(group["finished"].values()), sum(before["finished"].values()))
        prompt += _stats_growth(group, before, "prompt_tokens")
        prompt -= _stats_growth(group, before, "prefix_hit_tokens")
    return Rates(
        tokens_per_s=round(_tokens(groups, old) / span_s, 2),
        prompt_tokens_per_s=round(max(0.0, prompt) / span_s, 2),
        answers_per_s=round(finished / span_s, 3),
        ttft=_latency(groups, older, _TTFT),
        itl=_latency(groups, older, _ITL),
    )


def _tokens(groups: Sequence[dict[str, Any]], old: Sample) -> float:
    """New tokens that went to clients since then."""
    return sum(
        grown(
            group["latencies"][_TOKENS]["sum"], _same_group(old, group)["latencies"][_TOKENS]["sum"]
        )
        for group in groups
    )


def _latency(
    groups: Sequence[dict[str, Any]], older: Sample | None, name: str
) -> Percentiles | None:
    return percentiles(
        gained(
            group["latencies"][name],
            None if older is None else _same_group(older, group)["latencies"][name],
        )
        for group in groups
    )


def _hit_rate(group: dict[str, Any], older: Sample | None) -> float | None:
    if older is None or group["scheduler"] is None:
        return None
    before = _same_group(older, group)
    queried = _stats_growth(group, before, "prefix_queried_tokens")
    hit = _stats_growth(group, before, "prefix_hit_tokens")
    return round(min(1.0, hit / queried), 4) if queried else None


def _energy(
    groups: Sequence[dict[str, Any]], new: Sample, old: Sample | None, span_s: float
) -> Energy | None:
    """From the GPUs' energy counters; where one has none, its power of the moment."""
    uuids = [uuid for group in groups for uuid in group.get("gpus", ())]
    if not uuids or any(uuid not in new.gpus for uuid in uuids):
        return None
    power_w = 0.0
    for uuid in uuids:
        now, then = new.gpus[uuid], None if old is None else old.gpus.get(uuid)
        if now.energy_j is not None and then is not None and then.energy_j is not None and span_s:
            power_w += grown(now.energy_j, then.energy_j) / span_s
        elif now.power_w is not None:
            power_w += now.power_w
        else:
            return None
    tokens = 0.0 if old is None else _tokens(groups, old)
    return Energy(
        power_w=round(power_w, 1),
        j_per_token=round(power_w * span_s / tokens, 4) if tokens else None,
    )


def _actor(actor: dict[str, Any], new: Sample, old: Sample | None, span_s: float) -> ActorPicture:
    name, cpu = actor["name"], None
    if old is not None and span_s > 0 and name in new.cpu_s and name in old.cpu_s:
        same = any(
            each["name"] == name and each["pid"] == actor["pid"] for each in old.tree["actors"]
        )
        if same:
            cpu = round(max(0.0, new.cpu_s[name] - old.cpu_s[name]) / span_s, 3)
    return ActorPicture(
        name=name,
        role=actor["role"],
        group=actor["group"],
        pid=actor["pid"],
        state=actor["state"],
        restarts=actor["restarts"],
        threads=actor["threads"],
        cpu=cpu,
    )


def _stats_growth(group: dict[str, Any], before: dict[str, Any], field: str) -> float:
    now, then = group["scheduler"], before["scheduler"]
    if now is None:
        return 0.0
    return grown(now[field], 0 if then is None else then[field])


def _same_group(sample: Sample, group: dict[str, Any]) -> dict[str, Any]:
    """The group as it was: a node's groups do not change their number."""
    found: dict[str, Any] = sample.tree["groups"][group["group"]]
    return found
