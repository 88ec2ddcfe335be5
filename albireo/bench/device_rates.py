"""What a device delivers: bytes of a large copy, and operations of a large product, a second.

Run as a process of its own, so that the bench itself imports no PyTorch and
makes no CUDA context beside the node's.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from .nodes import BenchError

_ROUNDS = 10
_GPU_BYTES = 2 << 30
_CPU_BYTES = 256 << 20
_GPU_EDGE = 8192
_CPU_EDGE = 1024


def measure_bandwidth(device: str) -> float:
    """Bytes a second of device "cpu" or "cuda"; the best of a few copies, each way counted.

    Raises BenchError when the device cannot be used.
    """
    return _in_a_process("bandwidth", device, "float32")


def measure_products(device: str, dtype: str) -> float:
    """Operations a second of a product of square matrices of random numbers; the best of a few.

    Raises BenchError when the device cannot be used.
    """
    return _in_a_process("products", device, dtype)


def _in_a_process(what: str, device: str, dtype: str) -> float:
    process = subprocess.run(
        [sys.executable, "-P", "-m", "albireo.bench.device_rates", what, device, dtype],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if process.returncode != 0:
        raise BenchError(f"the {what} of {device} cannot be measured: {process.stderr[-500:]}")
    return float(process.stdout.strip().splitlines()[-1])


def _bandwidth(device: str) -> float:
    import torch

    size = _GPU_BYTES if device == "cuda" else _CPU_BYTES
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best_s(lambda: target.copy_(source), device)


def _products(device: str, dtype: str) -> float:
    import torch

    edge = _GPU_EDGE if device == "cuda" else _CPU_EDGE
    a = torch.randn(edge, edge, device=device).to(getattr(torch, dtype))
    out = torch.empty_like(a)
    return 2 * edge**3 / _best_s(lambda: torch.mm(a, a, out=out), device)


def _best_s(work: Callable[[], object], device: str) -> float:
    import torch

    best = math.inf
    for _ in range(_ROUNDS):
        if device == "cuda":
            begun: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            done: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begun.record()
            work()
            done.record()
            done.synchronize()
            seconds = begun.elapsed_time(done) / 1000
        else:
            begun_s = time.perf_counter()
            work()
            seconds = time.perf_counter() - begun_s
        best = min(best, seconds)
    return best


if __name__ == "__main__":
    what, device, dtype = sys.argv[1:]
    print(_bandwidth(device) if what == "bandwidth" else _products(device, dtype))
