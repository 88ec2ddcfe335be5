"""python -m tests.gpu.same_bits SECONDS: GEMMs again and again, and whether bits stay the same.

Two of these at once share the GPU, which then takes its time between any two instructions:
what is in order by luck alone is not in order any more.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from albireo.workers.kernels.cuda.e4m7 import pack
from albireo.workers.kernels.cuda.e4m7_gemm import e4m7_gemm
from albireo.workers.kernels.cuda.hopper import HopperTiling
from albireo.workers.kernels.cuda.hopper_gemm import hopper_gemm

from .gemm_reference import differences, random

TILINGS = [(128, 3, 1), (128, 4, 1), (64, 2, 1), (64, 2, 2), (256, 3, 1)]
_AT_ONCE = 50


def main(seconds: float) -> str:
    """Which first run differs from the one before, and how; "" for none."""
    torch.manual_seed(0)
    n, k = 16 * 67, 64 * 13
    weight = random(n, k) / k**0.5
    packed = pack(weight)
    assert packed is not None
    torch.cuda.synchronize()  # Weights are there before a kernel of theirs comes up.
    runs: list[tuple[str, Callable[[], torch.Tensor]]] = []
    for tiling in itertools.starmap(HopperTiling, TILINGS):
        x = random(3 * tiling.rows - 5, k)
        runs += [
            (f"e4m7 {tiling}", partial(e4m7_gemm, x, packed, None, tiling)),
            (f"bf16 {tiling}", partial(hopper_gemm, x, weight, None, tiling)),
        ]
    first = [run() for _, run in runs]
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        for (name, run), before in zip(runs, first, strict=True):
            for got in [run() for _ in range(_AT_ONCE)]:
                if differ := differences(got, before):
                    return f"{name}: {differ}"
    return ""


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])) or 0)
