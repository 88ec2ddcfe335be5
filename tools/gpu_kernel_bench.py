"""Times the CUDA kernels in the shapes of a model's decode step, each beside its floor.

    python tools/gpu_kernel_bench.py [--shape qwen3-8b] [--batch 1,64] [--json]
                                     [--e4m7-weights beside] [--kv-cache-dtype e4m7] [--apart]
                                     [--sustained SECONDS] [--tune | --tune-linear | --tune-prefill]

A kernel runs once a layer, for some layers with weights and KV of their own
(far more than the L2 cache holds), in one CUDA graph; a figure is the median
of its replays, per launch.  `layer` is all of a layer in order, `step` what a
model's layers and head make of it.  The floor is the bytes that must move over
the bandwidth of a large copy, measured first.  --tune: decode attention alone,
over ways to cut it up.  --tune-linear: the linear layers alone, by cuBLAS, as gemv.py,
few_rows.py and hopper_gemm.py have them now ("chosen"), and their best three tilings.
--tune-prefill: prefill attention alone, over tiles.  --apart: kernels wait for
each other instead of coming up early (overlap.py).  --e4m7-weights, --kv-cache-dtype: as a
node's; the floor is that of 12 bits then.  --sustained: every figure at the clock that the GPU
has when it has replayed the graph for so long, and the energy of a launch (gpu_replay.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict

import torch
from gpu_layers import CONTEXT, SHAPES, Row, ShapeBench, copy_bandwidth
from gpu_replay import sustain
from gpu_tunings import tune_decode, tune_linear, tune_prefill

from albireo.workers.kernels.cuda import overlap


def measure(options: argparse.Namespace, bandwidth: float) -> Iterator[Row]:
    batches = [int(size) for size in options.batch.split(",")]
    for name in options.shape.split(","):
        bench = ShapeBench(name, bandwidth, options.e4m7_weights, options.kv_cache_dtype)
        if options.tune_linear:
            for layer, rows in itertools.product(bench.sizes, batches):
                yield from tune_linear(bench, layer, rows)
            continue
        if options.tune_prefill:
            yield from tune_prefill(bench)
            continue
        if options.tune:
            for rows, context in itertools.product(batches, (CONTEXT, 2048)):
                if rows * context <= 128 * 2048:
                    yield from tune_decode(bench, rows, context)
            continue
        for rows in batches:
            yield from bench.decode(rows)
        for sequences, tokens in ((4, 2048), (1, 8192)):
            yield bench.prefill(sequences, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default=",".join(SHAPES), help=", ".join(SHAPES))
    parser.add_argument("--batch", default="1,64,128,256")
    parser.add_argument("--tune", action="store_true", help="decode attention alone")
    parser.add_argument("--tune-linear", action="store_true", help="linear layers alone")
    parser.add_argument("--tune-prefill", action="store_true", help="prefill attention alone")
    parser.add_argument("--e4m7-weights", choices=("off", "beside", "only"), default="off")
    parser.add_argument("--kv-cache-dtype", choices=("model", "e4m7"), default="model")
    parser.add_argument("--sustained", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--apart", action="store_true", help="kernels that wait for each other")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    if options.apart:
        overlap.can_overlap = lambda _: False
    bandwidth = copy_bandwidth()
    sustain(options.sustained)
    rows = []
    if not options.json:
        print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.2f} TB/s, {CONTEXT=}")
        energy = f"{'mJ':>10}" if options.sustained else ""
        print(f"{'shape':12}{'kernel':16}{'us':>10}{'floor':>10}{'share':>8}{energy}  case")
    for row in measure(options, bandwidth):
        rows.append(row)
        if not options.json:
            energy = f"{row.mj:10.2f}" if options.sustained else ""
            print(
                f"{row.shape:12}{row.kernel:16}{row.us:10.2f}{row.floor_us:10.2f}"
                f"{row.share_of_floor:8.2f}{energy}  {row.case}",
                flush=True,
            )
    if options.json:
        head = {"device": torch.cuda.get_device_name(), "copy_byte_s": round(bandwidth)}
        print(json.dumps({**head, "context": CONTEXT, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
