"""Where tests run side by side, each process has a GPU of its own, the n-th that is visible."""

from __future__ import annotations

import os

# Before anything asks CUDA what there is.
if (worker := os.environ.get("PYTEST_XDIST_WORKER", "")).startswith("gw"):
    number = int(worker.removeprefix("gw"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number] if visible else str(number)
