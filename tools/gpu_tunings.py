"""Ways to cut kernels up, each timed among the layers of gpu_layers.py, the best first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from gpu_layers import Row, ShapeBench, random, scattered
from gpu_replay import replay

from albireo.workers.kernels.cuda import attention, few_rows, gemv, hopper_gemm, linear
from albireo.workers.kernels.cuda.decode_tiling import ROUND, DecodeTiling
from albireo.workers.kernels.cuda.e4m7_decode import parts
from albireo.workers.kernels.cuda.hopper import HopperTiling

_BEYOND_L2 = 1 << 29
_GEMV_TILINGS = (
    # rows, columns, warps, stages, once
    (8, 512, 4, 4, False),
    (8, 512, 4, 6, False),
    (8, 512, 8, 4, False),
    (8, 256, 2, 5, False),
    (16, 256, 4, 4, False),
    (16, 512, 8, 4, False),
    (4, 1024, 4, 4, False),
    (4, 2048, 8, 3, False),
    (2, 1024, 4, 4, False),
    (8, 1024, 8, 1, True),
    (4, 1024, 4, 1, True),
    (4, 4096, 8, 1, True),
    (2, 2048, 4, 1, True),
    (2, 4096, 8, 1, True),
    (1, 4096, 4, 1, False),
    (1, 4096, 4, 1, True),
)

_PREFILL_TILES = (
    # rows, keys, warps, stages
    (128, 64, 8, 2),
    (128, 64, 8, 3),
    (128, 128, 8, 2),
    (128, 64, 4, 2),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 128, 4, 2),
)


def tune_decode(bench: ShapeBench, rows: int, context: int) -> Iterator[Row]:
    """Decode attention for ways to cut it up, best first."""
    chosen, shape = attention.decode_tiling, bench.shape
    batch, blocks = scattered(rows, context - 1, 1)
    caches = bench.caches(blocks)
    q = random(rows, shape.heads, shape.head_dim)
    size = rows * context * bench.kv_token_bytes + 2 * q.nbytes

    def timed(tiling: DecodeTiling, case: str) -> Row:
        attention.decode_tiling = lambda *_: tiling
        cost = bench.each(
            lambda i: bench.kernels.attention(q, caches[i], batch, shape.head_dim**-0.5, 0)
        )
        return bench.row("attention", f"B={rows} n={context} {case}{tiling}", cost, size)

    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    row_heads = rows * shape.kv_heads
    if caches[0].wide is not None:
        row_heads *= parts(shape.heads // shape.kv_heads)
    now = chosen(shape.head_dim, caches[0].keys.dtype, row_heads, processors)
    yield timed(now, "chosen: ")
    made = [timed(tiling, "") for tiling in _decode_tilings(caches[0].wide is not None)]
    attention.decode_tiling = chosen
    yield from sorted(made, key=lambda row: row.us)[:8]


def _decode_tilings(narrow: bool) -> Iterator[DecodeTiling]:
    """narrow: of a cache in 12 bits."""
    if narrow:
        for warps, rounds, programs in itertools.product((1, 2, 4, 8), (1, 2), (1, 2, 4, 8)):
            keys = ROUND * warps
            yield DecodeTiling(keys, keys * rounds, programs, warps, 2)
        return
    for options in itertools.product((32, 64, 128), (32, 64), (2, 3, 4, 6, 8), (2, 4), (2, 3, 4)):
        yield DecodeTiling(*options)


def tune_prefill(bench: ShapeBench) -> Iterator[Row]:
    """Prefill attention for tiles of (rows, keys), warps and stages."""
    chosen = attention._prefill_tile
    for tile in _PREFILL_TILES:
        attention._prefill_tile = lambda *_, tile=tile: tile
        for sequences, tokens in ((4, 2048), (1, 8192)):
            row = bench.prefill(sequences, tokens)
            yield replace(row, case=f"{row.case} {tile}")
    attention._prefill_tile = chosen


def tune_linear(bench: ShapeBench, layer: str, rows: int) -> Iterator[Row]:
    """A linear layer of few rows: by cuBLAS, as chosen now, and the best of other tilings."""
    n, m = bench.sizes[layer]
    out = torch.float32 if layer == "lm_head" else None
    x, size = random(rows, m), 2 * n * m
    weight = random(n, m, scale=m**-0.5)
    copies = max(2, _BEYOND_L2 // size)
    packed = [bench.kernels.pack_linear(weight, None, out) for _ in range(copies)]

    many, gated = rows > few_rows.MAX_ROWS, layer == "gate_up"

    def run() -> None:
        for one in packed:
            if gated:
                bench.kernels.gated_linear(x, one, "silu")
            else:
                bench.kernels.linear(x, one)

    def by_cublas() -> None:
        for one in packed:
            y = linear.cublas(x, one)
            if gated:
                bench.kernels.silu_mul(y)

    chooser = "hopper_tiling" if many else "gemv_tiling" if rows == 1 else "few_rows_tiling"
    choose = getattr(linear, chooser)

    def timed(tiling: object, case: str) -> Row:
        setattr(linear, chooser, lambda *_: tiling)
        return bench.row(layer, f"B={rows} {case}", replay(run) * (1 / copies), size)

    yield bench.row(layer, f"B={rows} cuBLAS", replay(by_cublas) * (1 / copies), size)
    sizes = (m,) if rows == 1 else (n, m, rows, gated) if many else (n, m, rows)
    chosen: object = choose(*sizes)
    yield timed(chosen, f"chosen: {chosen}")
    tilings: list[object] = []
    if many:
        whole = -(-rows // 64) * 64
        tiles = (whole,) if whole <= hopper_gemm.MAX_ROWS else (128, 192, 256)
        tilings += [
            HopperTiling(tile, groups, splits)
            for tile, groups, splits in itertools.product(tiles, (1, 2, 3, 4), (1, 2, 3))
            if out is None and (groups < 4 or tile <= 128)
        ]
    elif rows == 1:
        tilings += [
            gemv.GemvTiling(outputs, columns, warps, stages if m > columns else 1, once)
            for outputs, columns, warps, stages, once in _GEMV_TILINGS
            if columns < 2 * m
        ]
    else:
        tilings += [
            few_rows.FewRowsTiling(outputs, 128, splits, stages)
            for outputs, splits, stages in itertools.product((64, 128), (1, 2, 4), (3, 4, 6))
            if n % outputs == 0 and m >= 256 * splits and outputs * stages < 128 * 6
        ]
    made = [timed(tiling, str(tiling)) for tiling in tilings]
    setattr(linear, chooser, choose)
    yield from sorted(made, key=lambda row: row.us)[:3]
