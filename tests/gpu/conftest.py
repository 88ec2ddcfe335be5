"""Where tests run side by side, each process sees one GPU, of which two processes use each."""

from __future__ import annotations

import os

_PROCESSES = 2
"""Of a GPU, as the Makefile starts them."""

# Before anything asks CUDA what there is.
if (worker := os.environ.get("PYTEST_XDIST_WORKER", "")).startswith("gw"):
    number = int(worker.removeprefix("gw")) // _PROCESSES
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number] if visible else str(number)
