"""What a simulation has to say: times, goodput, counters, and the load over time."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from .histogram import Histogram
from .shard import GroupResult, ShardResult

NOBODY = "-"
"""The tenant of requests that name none."""
_MOST_SAMPLES = 2000
_FIRST_INTERVAL_S = 0.1
_KIB_PER_MIB = 1024
_MOST_TENANTS = 16


class _Tenant:
    """Times of one tenant's requests."""

    def __init__(self) -> None:
        self._times = {name: Histogram() for name in ("ttft", "tpot", "e2e")}

    def add(self, found: dict[str, float]) -> None:
        for name, value in found.items():
            self._times[name].add(value)

    def tree(self) -> dict[str, Any]:
        times = {f"{name}_ms": each.tree() for name, each in self._times.items()}
        return {"completed": self._times["e2e"].count, **times}


class Figures:
    """slo_s: ("ttft" | "tpot" | "e2e") -> seconds that a good request does not exceed."""

    def __init__(self, slo_s: dict[str, float]) -> None:
        self.ttft, self.tpot, self.itl, self.e2e = (Histogram() for _ in range(4))
        self.completed = self.good = self.tokens = self.refused = 0
        self.never: str | None = None
        self.samples: list[tuple[float, int, int]] = []
        self._groups: list[GroupResult] = []
        self._tenants: defaultdict[str, _Tenant] = defaultdict(_Tenant)
        self._peak_kib = 0
        self._slo_s = slo_s
        self._interval_s = _FIRST_INTERVAL_S

    def add(self, tenant: str, arrived: float, first: float, last: float, tokens: int) -> None:
        """A request has ended; seconds."""
        found = {"ttft": first - arrived, "e2e": last - arrived}
        self.ttft.add(found["ttft"])
        self.e2e.add(found["e2e"])
        if tokens > 1:
            found["tpot"] = (last - first) / (tokens - 1)
            self.tpot.add(found["tpot"])
        known = tenant in self._tenants
        if known or (tenant != NOBODY and len(self._tenants) < _MOST_TENANTS):
            self._tenants[tenant].add(found)
        self.completed += 1
        self.tokens += tokens
        self.good += all(found.get(name, 0.0) <= most for name, most in self._slo_s.items())

    def refuse(self, message: str) -> None:
        """A request can never run."""
        self.refused += 1
        self.never = self.never or message

    def sample(self, now: float, running: int, waiting: int) -> float:
        """Keeps a sample; returns the seconds until the next one is wanted."""
        self.samples.append((now, running, waiting))
        if len(self.samples) >= _MOST_SAMPLES:
            del self.samples[1::2]
            self._interval_s *= 2
        return self._interval_s

    def take(self, result: ShardResult) -> None:
        """What groups have counted; to be called in the order of their numbers."""
        for group in result.groups:
            self.itl.merge(group.gap_times())
        self._groups += result.groups
        self._peak_kib += result.peak_kib

    def tree(self, virtual_s: float, wall_s: float) -> dict[str, Any]:
        """Times in milliseconds, as maps of mean and percentiles; of the first 16 tenants, too."""
        groups = self._groups
        counters = [group.counters for group in groups]
        queried = sum(each.prefix_queried_tokens for each in counters)
        hit = sum(each.prefix_hit_tokens for each in counters)
        steps = sum(each.steps for each in counters)
        asked = self.completed + self.refused
        return {
            "requests": {"completed": self.completed, "refused": self.refused},
            "virtual_s": round(virtual_s, 3),
            "requests_per_s": round(self.completed / virtual_s, 3) if virtual_s else 0.0,
            "output_tokens_per_s": round(self.tokens / virtual_s, 1) if virtual_s else 0.0,
            "ttft_ms": self.ttft.tree(),
            "tpot_ms": self.tpot.tree(),
            "itl_ms": self.itl.tree(),
            "e2e_ms": self.e2e.tree(),
            "goodput": {
                "slo_ms": {name: most * 1e3 for name, most in self._slo_s.items()},
                "share": round(self.good / asked, 4) if asked else 0.0,
                "requests_per_s": round(self.good / virtual_s, 3) if virtual_s else 0.0,
            },
            "tenants": {name: each.tree() for name, each in sorted(self._tenants.items())},
            "steps": steps,
            "busy": round(sum(group.busy_s for group in groups) / len(groups) / virtual_s, 4)
            if virtual_s
            else 0.0,
            "preemptions": sum(each.preemptions for each in counters),
            "prefix_hit_share": round(hit / queried, 4) if queried else 0.0,
            "wall_s": round(wall_s, 2),
            "peak_memory_mib": self._peak_kib // _KIB_PER_MIB,
        }
