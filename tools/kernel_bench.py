"""Times the CPU kernels in the shapes of a model's step, each beside its floor.

    python tools/kernel_bench.py [--dtype bfloat16] [--threads 2] [--json]

A figure is the best of some rounds over all layers, so that weights and KV
come from memory as they do in a real step.  The floor is the bytes a kernel
has to move over the bandwidth measured first (one thread reading, or all).
Default shapes are those of SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from albireo.workers.engine.batch import StepBatch
from albireo.workers.kernels import create
from albireo.workers.kernels.interface import Kernels, KVLayer

_ROUNDS = 7
_BLOCK = 16


@dataclass(frozen=True)
class Shape:
    """One model: sizes as in its config."""

    layers: int = 30
    hidden: int = 576
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    intermediate: int = 1536
    vocab: int = 49152

    def linears(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of a layer's projections."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            (q + 2 * kv, self.hidden),
            (self.hidden, q),
            (2 * self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
        ]


@dataclass(frozen=True)
class Row:
    """One measurement; times are for all layers of the model together."""

    kernel: str
    case: str
    ms: float
    floor_ms: float
    gbyte_s: float
    gflop_s: float


def best_s(run: Callable[[], object]) -> float:
    """Seconds of the fastest of some rounds."""
    run()
    best = float("inf")
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


class Bench:
    """The kernels under test with everything they need."""

    def __init__(self, shape: Shape, dtype: torch.dtype, threads: int) -> None:
        self.shape, self.dtype = shape, dtype
        self.kernels: Kernels = create("cpu", dtype, False)
        self.kernels.warm_up()
        self.kernels.set_threads(threads)
        self.size = dtype.itemsize
        self.bandwidth = self._read_bandwidth()

    def _read_bandwidth(self) -> float:
        """Bytes a second of a matrix-vector product over 256 MB."""
        weight = torch.zeros(1 << 16, (1 << 12) // self.size, dtype=self.dtype)
        packed = self.kernels.pack_linear(weight, None)
        x = torch.zeros(1, weight.shape[1], dtype=self.dtype)
        return weight.nbytes / best_s(lambda: self.kernels.linear(x, packed))

    def row(
        self, kernel: str, case: str, run: Callable[[], object], size: float, flop: float
    ) -> Row:
        seconds = best_s(run)
        return Row(
            kernel,
            case,
            round(seconds * 1e3, 3),
            round(size / self.bandwidth * 1e3, 3),
            round(size / seconds / 1e9, 1),
            round(flop / seconds / 1e9, 1),
        )

    def linear(self) -> Iterator[Row]:
        """All projections of the model, and its head."""
        shape = self.shape
        pairs = [pair for _ in range(shape.layers) for pair in shape.linears()]
        packed = [
            self.kernels.pack_linear(torch.randn(n, k).to(self.dtype), None)
            for n, k in [*pairs, (shape.vocab, shape.hidden)]
        ]
        elements = sum(n * k for n, k in pairs)
        for rows in (1, 2, 4, 8, 16, 32, 64, 128, 512):
            head = rows <= 64  # a prefill's head sees few rows
            used = packed if head else packed[:-1]
            xs = {k: torch.randn(rows, k).to(self.dtype) for k in {p.k for p in used}}
            count = elements + shape.vocab * shape.hidden * head

            def run(used: list[Any] = used, xs: dict[int, torch.Tensor] = xs) -> None:
                for p in used:
                    self.kernels.linear(xs[p.k], p)

            yield self.row("linear", f"T={rows}", run, count * self.size, 2 * rows * count)

    def attention(self) -> Iterator[Row]:
        """Decodes and prefill chunks over all layers, with the write into the cache."""
        cases = [(b, c - 1, 1) for b in (1, 8, 32) for c in (100, 1000)]
        cases += [(1, 0, 512), (1, 1536, 512)]
        for sequences, start, tokens in cases:
            shape, context = self.shape, start + tokens
            batch, blocks = scattered(sequences, start, tokens)
            caches = [
                self.kernels.new_kv_layer(
                    blocks, _BLOCK, shape.kv_heads, shape.head_dim, self.dtype
                )
                for _ in range(shape.layers)
            ]
            for kv in caches:
                kv.keys.normal_()
                kv.values.normal_()
            rows = sequences * tokens
            q = torch.randn(rows, shape.heads, shape.head_dim).to(self.dtype)
            kv_bytes = sequences * context * shape.kv_heads * shape.head_dim * 2 * self.size
            pairs = sequences * sum(range(start + 1, context + 1))
            flop = 4 * pairs * shape.heads * shape.head_dim * shape.layers

            def attend(
                q: torch.Tensor = q, batch: StepBatch = batch, caches: list[KVLayer] = caches
            ) -> None:
                for kv in caches:
                    self.kernels.attention(q, kv, batch, 0.125, 0)

            case = f"B={sequences} T={rows} context={context}"
            yield self.row("attention", case, attend, kv_bytes * shape.layers, flop)
            yield self.rope(case, batch, caches)

    def rope(self, case: str, batch: StepBatch, caches: list[KVLayer]) -> Row:
        shape = self.shape
        rows = len(batch.positions)
        qkv = torch.randn(rows, shape.linears()[0][0]).to(self.dtype)
        table = torch.randn(4096, shape.head_dim)

        def run() -> None:
            for kv in caches:
                self.kernels.rope_and_cache(
                    qkv, shape.heads, shape.kv_heads, shape.head_dim, None, None, 1e-5,
                    table, batch, kv,
                )  # fmt: skip

        return self.row("rope_and_cache", case, run, 2 * qkv.nbytes * shape.layers, 0)

    def row_wise(self) -> Iterator[Row]:
        """Norms, activation and embedding; these are mostly what a call costs."""
        shape, kernels = self.shape, self.kernels
        weight = torch.randn(shape.hidden)
        table = torch.randn(shape.vocab, shape.hidden).to(self.dtype)
        for rows in (1, 32, 512):
            x = torch.randn(rows, shape.hidden).to(self.dtype)
            residual = x.clone()
            gate_up = torch.randn(rows, 2 * shape.intermediate).to(self.dtype)
            tokens = torch.randint(0, shape.vocab, (rows,), dtype=torch.int32)
            runs: list[tuple[str, Callable[[], object], int]] = [
                ("rms_norm", partial(kernels.rms_norm, x, weight, 1e-5), 2 * x.nbytes),
                (
                    "add_rms_norm",
                    partial(kernels.add_rms_norm, x, residual, weight, 1e-5),
                    4 * x.nbytes,
                ),
                ("silu_mul", partial(kernels.silu_mul, gate_up), gate_up.nbytes * 3 // 2),
                ("embed", partial(kernels.embed, tokens, table, 0), 2 * x.nbytes),
            ]
            for name, call, size in runs:

                def run(call: Callable[[], object] = call) -> None:
                    for _ in range(shape.layers):
                        call()

                yield self.row(name, f"T={rows}", run, size * shape.layers, 0)


def scattered(sequences: int, start: int, tokens: int) -> tuple[StepBatch, int]:
    """A batch of equal sequences in shuffled blocks, and the number of blocks."""
    each = -(-(start + tokens) // _BLOCK)
    tables = np.random.default_rng(0).permutation(sequences * each).reshape(sequences, each)
    positions = np.tile(np.arange(start, start + tokens), sequences)
    owner = np.repeat(np.arange(sequences), tokens)
    index = tables[owner, positions // _BLOCK] * _BLOCK + positions % _BLOCK

    def ints(values: object) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int32))

    batch = StepBatch(
        tokens=ints(np.zeros(len(positions))),
        positions=ints(positions),
        kv_index=ints(index),
        query_start=ints(np.arange(sequences + 1) * tokens),
        context_len=ints(np.full(sequences, start + tokens)),
        slots=ints(np.arange(sequences)),
        block_tables=ints(tables),
        sample_rows=ints([0]),
        num_chunks=0,
    )
    return batch, sequences * each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=("linear", "attention", "row_wise"), action="append")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    bench = Bench(Shape(), getattr(torch, options.dtype), options.threads)
    parts = options.only or ["linear", "attention", "row_wise"]
    gbyte_s = round(bench.bandwidth / 1e9, 1)
    if not options.json:
        print(f"{options.dtype}, {options.threads} threads, {gbyte_s} GB/s; all layers together")
        print(f"{'kernel':16}{'case':30}{'ms':>9}{'floor':>9}{'GB/s':>8}{'GFLOP/s':>9}")
    rows = []
    for part in parts:
        for row in getattr(bench, part)():
            rows.append(row)
            if not options.json:
                print(
                    f"{row.kernel:16}{row.case:30}{row.ms:9.3f}{row.floor_ms:9.3f}"
                    f"{row.gbyte_s:8.1f}{row.gflop_s:9.1f}",
                    flush=True,
                )
    if options.json:
        head = {"dtype": options.dtype, "threads": options.threads, "read_gbyte_s": gbyte_s}
        print(json.dumps({**head, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
