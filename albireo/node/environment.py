"""The environment of the node's processes: libraries' thread pools are set on purpose."""

from __future__ import annotations

import os

from albireo.ipc.paths import cache_dir


def child_environment(device: str) -> dict[str, str]:
    """The supervisor's environment with thread pools tamed and caches placed.

    Workers set PyTorch's number of threads themselves, from the core plan.
    Waiting is passive: a spinning OpenMP thread takes the core that another
    worker, or an actor, needs.  An explicit setting by the user wins where
    nothing depends on it; the other values are what forking safely relies on.
    """
    environment = dict(os.environ)
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("TRITON_CACHE_DIR", str(cache_dir() / "triton"))
    environment.update(
        OMP_DYNAMIC="FALSE",
        OPENBLAS_NUM_THREADS="1",
        NUMBA_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        NUMBA_CACHE_DIR=str(cache_dir() / "numba"),
        PYTHONUNBUFFERED="1",
    )
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment
