"""How many threads each process gets, decided once from the cores and the groups.

PyTorch starts as many threads as it sees cores in every process; with several
workers on a small machine these starve each other.  Workers share the cores
evenly; where there are plenty, two are left to the actors that feed them.
"""

from __future__ import annotations

import msgspec

from albireo.ipc.cpu_quota import usable_cores

_MOST_LOADING_THREADS = 8


class CorePlan(msgspec.Struct, frozen=True, kw_only=True):
    """cores: of this machine that the node may use; worker_threads: of each worker.

    spin_us: how long a worker spins for its peers before it sleeps; 0 where the
    peers need the core.  Where it is not, who waits for a GPU spins all the time, and
    who waits for a step stays awake behind the last one (EngineConfig.awake_s).
    """

    cores: int
    workers: int
    worker_threads: int
    spin_us: int

    @property
    def loading_threads(self) -> int:
        """With which a GPU's worker copies its weights: its share of half the cores, for groups
        that are up serve meanwhile."""
        return min(max(1, self.cores // (2 * self.workers)), _MOST_LOADING_THREADS)

    def describe(self) -> str:
        """One line for the start-up display."""
        plural = "s" if self.worker_threads > 1 else ""
        waiting = "awake behind a step" if self.spin_us else "sleep while waiting"
        return (
            f"{self.cores} cores: {self.workers} worker(s) of {self.worker_threads} "
            f"thread{plural}, {waiting}; the other actors 1 thread each"
        )


def make_core_plan(
    groups: tuple[int, ...],
    device: str,
    threads: int | None,
    cores: int | None = None,
    gateways: int = 0,
) -> CorePlan:
    """Plans for the cores this process may run on (or `cores`).

    `threads` overrides the number for each worker.
    """
    cores = cores or usable_cores()
    workers = sum(groups)
    actors = 2 + gateways + 2 * len(groups)
    if threads is None:
        if device in ("cuda", "sim"):
            threads = 1
        else:
            spare = 2 if cores >= 2 * workers + 4 else 0
            threads = max(1, (cores - spare) // workers)
    # A GPU's worker has a second thread, which waits for results (workers/engine/cuda/flights.py).
    waiting = workers if device == "cuda" else 0
    roomy = cores >= workers * threads + waiting + actors
    return CorePlan(
        cores=cores, workers=workers, worker_threads=threads, spin_us=50 if roomy else 0
    )
