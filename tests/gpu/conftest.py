"""Where tests run side by side, each process sees one GPU, of which two processes use each."""

from __future__ import annotations

import os

_PROCESSES = 2
"""Of a GPU, as the Makefile starts them."""


def gpu_of(worker: str, visible: str | None) -> str | None:
    """CUDA_VISIBLE_DEVICES of pytest-xdist's process `worker`; visible: that of them all.

    Where it names fewer GPUs than the machine has, and the Makefile counts, more processes share
    each.  None: it stays as it is, for there is no such process, or no GPU to be seen.
    """
    if not worker.startswith("gw") or visible == "":
        return None
    number = int(worker.removeprefix("gw")) // _PROCESSES
    names = visible.split(",") if visible else [str(number)]
    return names[number % len(names)]


# Before anything asks CUDA what there is.
if chosen := gpu_of(
    os.environ.get("PYTEST_XDIST_WORKER", ""), os.environ.get("CUDA_VISIBLE_DEVICES")
):
    os.environ["CUDA_VISIBLE_DEVICES"] = chosen
