"""What the memory of a device delivers: bytes read and written by a large copy, a second.

Run as a process of its own, so that the bench itself imports no PyTorch and
makes no CUDA context beside the node's.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

_ROUNDS = 10
_GPU_BYTES = 2 << 30
_CPU_BYTES = 256 << 20


def measure_bandwidth(device: str) -> float:
    """Bytes a second of device "cpu" or "cuda"; the best of a few copies, each way counted.

    Raises RuntimeError when the device cannot be used.
    """
    process = subprocess.run(
        [sys.executable, "-P", "-m", "albireo.bench.bandwidth", device],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if process.returncode != 0:
        raise RuntimeError(f"the bandwidth of {device} cannot be measured: {process.stderr[-500:]}")
    return float(process.stdout.strip().splitlines()[-1])


def _measure(device: str) -> float:
    import torch

    size = _GPU_BYTES if device == "cuda" else _CPU_BYTES
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(_ROUNDS):
        if device == "cuda":
            begun: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            done: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begun.record()
            target.copy_(source)
            done.record()
            done.synchronize()
            seconds = begun.elapsed_time(done) / 1000
        else:
            begun_s = time.perf_counter()
            target.copy_(source)
            seconds = time.perf_counter() - begun_s
        best = max(best, 2 * size / seconds)
    return best


if __name__ == "__main__":
    print(_measure(sys.argv[1]))
