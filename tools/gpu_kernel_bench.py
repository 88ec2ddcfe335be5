"""Times the CUDA kernels in the shapes of a model's decode step, each beside its floor.

    python tools/gpu_kernel_bench.py [--shape qwen3-8b] [--batch 1,64] [--json]
                                     [--tune | --tune-linear | --tune-prefill | --apart]

A kernel runs once a layer, for some layers with weights and KV of their own
(far more than the L2 cache holds), in one CUDA graph; a figure is the median
of its replays, per launch.  `layer` is all of a layer in order, `step` what a
model's layers and head make of it.  The floor is the bytes that must move over
the bandwidth of a large copy, measured first.  --tune: decode attention alone,
over ways to cut it up.  --tune-linear: the linear layers alone, by cuBLAS, as gemv.py,
few_rows.py and hopper_gemm.py have them now ("chosen"), and their best three tilings.
--tune-prefill: prefill attention alone, over tiles.  --apart: kernels wait for
each other instead of coming up early (overlap.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch

from albireo.workers.engine.batch import StepBatch
from albireo.workers.kernels import create
from albireo.workers.kernels.cuda import few_rows, hopper_gemm, overlap
from albireo.workers.kernels.interface import KVLayer

_BLOCK = 16
_CONTEXT = 320
_MAX_LEN = 4096
_LAYERS = 10
_ROUNDS, _ROUND_MS = 5, 4.0
_DTYPE = torch.bfloat16
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
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 128, 4, 2),
)


@dataclass(frozen=True)
class Shape:
    """One model, or what a rank has of it: sizes as in its config."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        return self.q_width + 2 * self.kv_heads * self.head_dim


SHAPES = {
    "gemma-3-4b": Shape(34, 2560, 8, 4, 256, 10240, 262208),
    "phi-3-mini": Shape(32, 3072, 32, 32, 96, 8192, 32064),
    "qwen3-0.6b": Shape(28, 1024, 16, 8, 128, 3072, 151936),
    "qwen3-8b": Shape(36, 4096, 32, 8, 128, 12288, 151936),
    "qwen3-8b-half": Shape(36, 4096, 16, 4, 128, 6144, 75968),
    "llama-3.1-8b": Shape(32, 4096, 32, 8, 128, 14336, 128256),
}


@dataclass(frozen=True)
class Row:
    """One measurement: of one launch, one layer or one step."""

    shape: str
    kernel: str
    case: str
    us: float
    floor_us: float
    share_of_floor: float


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, dtype=_DTYPE, device="cuda") * scale


def replay_us(run: Callable[[], object]) -> float:
    """Microseconds of all that `run` launches, captured in one graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once(replays: int) -> float:
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / replays * 1e3

    replays = max(1, int(_ROUND_MS * 1e3 / once(1)))
    return statistics.median(once(replays) for _ in range(_ROUNDS))


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / (replay_us(lambda: target.copy_(source)) * 1e-6)


class ShapeBench:
    """A model's layers on the GPU."""

    def __init__(self, name: str, bandwidth: float) -> None:
        self.name, self.shape, self.bandwidth = name, SHAPES[name], bandwidth
        self.kernels = k = create("cuda", _DTYPE, False)
        shape = self.shape
        sizes = {
            "qkv": (shape.qkv_width, shape.hidden),
            "o": (shape.hidden, shape.q_width),
            "gate_up": (2 * shape.intermediate, shape.hidden),
            "down": (shape.hidden, shape.intermediate),
        }
        self.linears = {
            name: [k.pack_linear(random(n, m, scale=m**-0.5), None) for _ in range(_LAYERS)]
            for name, (n, m) in sizes.items()
        }
        self.weight_bytes = {name: 2 * n * m for name, (n, m) in sizes.items()}
        head = random(shape.vocab, shape.hidden, scale=shape.hidden**-0.5)
        self.head = k.pack_linear(head, None, torch.float32)
        self.sizes = {**sizes, "lm_head": (shape.vocab, shape.hidden)}
        self.norm = torch.randn(shape.hidden, device="cuda")
        self.head_norm = torch.randn(shape.head_dim, device="cuda")
        self.rope = torch.randn(_MAX_LEN, shape.head_dim, device="cuda")

    def row(self, kernel: str, case: str, us: float, size: float) -> Row:
        floor = size / self.bandwidth * 1e6
        return Row(self.name, kernel, case, round(us, 2), round(floor, 2), round(floor / us, 3))

    def caches(self, blocks: int) -> list[KVLayer]:
        shape, made = self.shape, []
        for _ in range(_LAYERS):
            kv = self.kernels.new_kv_layer(blocks, _BLOCK, shape.kv_heads, shape.head_dim, _DTYPE)
            kv.keys.normal_()
            kv.values.normal_()
            made.append(kv)
        return made

    def decode(self, rows: int) -> Iterator[Row]:
        """Every kernel of a step of `rows` decodes, a layer, and the step."""
        k, shape, case = self.kernels, self.shape, f"B={rows}"
        batch, blocks = scattered(rows, _CONTEXT - 1, 1)
        caches = self.caches(blocks)
        x, residual = random(rows, shape.hidden), random(rows, shape.hidden)
        qkv = random(rows, shape.qkv_width)
        attended, inner = random(rows, shape.q_width), random(rows, shape.intermediate)
        q = attended.view(rows, shape.heads, shape.head_dim)

        def norm(i: int, x: torch.Tensor = x) -> torch.Tensor:
            return k.add_rms_norm(x, residual, self.norm, 1e-6)

        def rope(i: int, qkv: torch.Tensor = qkv) -> torch.Tensor:
            return k.rope_and_cache(
                qkv, shape.heads, shape.kv_heads, shape.head_dim, self.head_norm,
                self.head_norm, 1e-6, self.rope, batch, caches[i],
            )  # fmt: skip

        def attend(i: int, q: torch.Tensor = q) -> torch.Tensor:
            return k.attention(q, caches[i], batch, shape.head_dim**-0.5, 0)

        def gated(i: int) -> torch.Tensor:
            return k.gated_linear(x, self.linears["gate_up"][i], "silu")

        def gemm(name: str, x: torch.Tensor) -> Callable[[int], torch.Tensor]:
            return lambda i: k.linear(x, self.linears[name][i])

        def layer(i: int) -> torch.Tensor:
            y = attend(i, rope(i, k.linear(norm(i), self.linears["qkv"][i])))
            y = norm(i, k.linear(y, self.linears["o"][i]))
            y = k.gated_linear(y, self.linears["gate_up"][i], "silu")
            return k.linear(y, self.linears["down"][i])

        kv_bytes = rows * _CONTEXT * shape.kv_heads * shape.head_dim * 4
        weights = self.weight_bytes
        calls: list[tuple[str, Callable[[int], object], float]] = [
            ("add_rms_norm", norm, 4 * x.nbytes),
            ("qkv", gemm("qkv", x), weights["qkv"] + x.nbytes + qkv.nbytes),
            ("rope_and_cache", rope, 2 * qkv.nbytes),
            ("attention", attend, kv_bytes + 2 * q.nbytes),
            ("o", gemm("o", attended), weights["o"] + attended.nbytes + x.nbytes),
            ("gate_up, silu", gated, weights["gate_up"] + x.nbytes + inner.nbytes),
            ("down", gemm("down", inner), weights["down"] + inner.nbytes + x.nbytes),
            ("layer", layer, sum(weights.values()) + kv_bytes),
        ]
        found = {}
        for name, call, size in calls:
            found[name] = self.row(name, case, self._each_us(call), size)
            yield found[name]
        head_us = replay_us(lambda: k.linear(x, self.head))
        head = self.row("lm_head", case, head_us, self.head.weight.nbytes)
        yield head
        floor = (found["layer"].floor_us * shape.layers + head.floor_us) * 1e-6 * self.bandwidth
        yield self.row("step", case, found["layer"].us * shape.layers + head.us, floor)

    def prefill(self, sequences: int, tokens: int) -> Row:
        """Attention of whole prompts; its floor is that of 800 TFLOP/s."""
        shape = self.shape
        batch, blocks = scattered(sequences, 0, tokens)
        batch.num_chunks = sequences
        caches = self.caches(blocks)
        q = random(sequences * tokens, shape.heads, shape.head_dim)
        us = self._each_us(
            lambda i: self.kernels.attention(q, caches[i], batch, shape.head_dim**-0.5, 0)
        )
        flop = 2 * sequences * tokens * (tokens + 1) * shape.q_width
        case = f"{sequences} x {tokens}: {flop / us / 1e6:.0f} TFLOP/s"
        return self.row("prefill", case, us, flop / 800e12 * self.bandwidth)

    def tune(self, rows: int, context: int) -> Iterator[Row]:
        """Decode attention for ways to cut it up, best first."""
        from albireo.workers.kernels.cuda import attention

        chosen, shape = attention.decode_tiling, self.shape
        batch, blocks = scattered(rows, context - 1, 1)
        caches = self.caches(blocks)
        q = random(rows, shape.heads, shape.head_dim)
        size = rows * context * shape.kv_heads * shape.head_dim * 4 + 2 * q.nbytes

        def timed(tiling: attention.DecodeTiling, case: str) -> Row:
            attention.decode_tiling = lambda *_: tiling
            us = self._each_us(
                lambda i: self.kernels.attention(q, caches[i], batch, shape.head_dim**-0.5, 0)
            )
            return self.row("attention", f"B={rows} n={context} {case}{tiling}", us, size)

        now = chosen(shape.head_dim, _DTYPE, rows * shape.kv_heads)
        yield timed(now, "chosen: ")
        made = [
            timed(attention.DecodeTiling(*options), "")
            for options in itertools.product((32, 64), (32, 64), (2, 3, 4, 6, 8), (2, 4), (2, 3, 4))
        ]
        attention.decode_tiling = chosen
        yield from sorted(made, key=lambda row: row.us)[:8]

    def tune_prefill(self) -> Iterator[Row]:
        """Prefill attention for tiles of (rows, keys), warps and stages."""
        from albireo.workers.kernels.cuda import attention

        chosen = attention._prefill_tile
        for tile in _PREFILL_TILES:
            attention._prefill_tile = lambda *_, tile=tile: tile
            for sequences, tokens in ((4, 2048), (1, 8192)):
                row = self.prefill(sequences, tokens)
                yield replace(row, case=f"{row.case} {tile}")
        attention._prefill_tile = chosen

    def tune_linear(self, layer: str, rows: int) -> Iterator[Row]:
        """A linear layer of few rows: by cuBLAS, as chosen now, and the best of other tilings."""
        from albireo.workers.kernels.cuda import gemv, linear

        n, m = self.sizes[layer]
        out = torch.float32 if layer == "lm_head" else None
        x, size = random(rows, m), 2 * n * m
        weight = random(n, m, scale=m**-0.5)
        copies = max(2, _BEYOND_L2 // size)
        packed = [self.kernels.pack_linear(weight, None, out) for _ in range(copies)]

        many, gated = rows > few_rows.MAX_ROWS, layer == "gate_up"

        def run() -> None:
            for one in packed:
                if gated:
                    self.kernels.gated_linear(x, one, "silu")
                else:
                    self.kernels.linear(x, one)

        def by_cublas() -> None:
            for one in packed:
                y = linear.cublas(x, one)
                if gated:
                    self.kernels.silu_mul(y)

        chooser = "hopper_tiling" if many else "gemv_tiling" if rows == 1 else "few_rows_tiling"
        choose = getattr(linear, chooser)

        def timed(tiling: object, case: str) -> Row:
            setattr(linear, chooser, lambda *_: tiling)
            return self.row(layer, f"B={rows} {case}", replay_us(run) / copies, size)

        yield self.row(layer, f"B={rows} cuBLAS", replay_us(by_cublas) / copies, size)
        chosen: object = choose(m) if rows == 1 else choose(n, m, rows)
        yield timed(chosen, f"chosen: {chosen}")
        tilings: list[object] = []
        if many:
            tile = -(-rows // 64) * 64
            tilings += [
                hopper_gemm.HopperTiling(tile, groups, splits)
                for groups, splits in itertools.product((1, 2, 3, 4), (1, 2, 3))
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

    def _each_us(self, call: Callable[[int], object]) -> float:
        """Of a call on each of the layers, one after the other."""

        def run() -> None:
            for i in range(_LAYERS):
                call(i)

        return replay_us(run) / _LAYERS


def scattered(sequences: int, start: int, tokens: int) -> tuple[StepBatch, int]:
    """A batch of equal sequences in shuffled blocks, and the number of blocks."""
    each = -(-(start + tokens) // _BLOCK)
    generator = torch.Generator().manual_seed(0)
    owned = torch.randperm(sequences * each, generator=generator).view(sequences, each)
    tables = torch.zeros(sequences, max(each, _MAX_LEN // _BLOCK), dtype=torch.long)
    tables[:, :each] = owned
    positions = torch.arange(start, start + tokens).repeat(sequences)
    owner = torch.arange(sequences).repeat_interleave(tokens)
    index = tables[owner, positions // _BLOCK] * _BLOCK + positions % _BLOCK

    def ints(values: torch.Tensor) -> torch.Tensor:
        return values.to(torch.int32).cuda()

    batch = StepBatch(
        tokens=ints(torch.zeros_like(positions)),
        positions=ints(positions),
        kv_index=ints(index),
        query_start=ints(torch.arange(sequences + 1) * tokens),
        context_len=ints(torch.full((sequences,), start + tokens)),
        slots=ints(torch.arange(sequences)),
        block_tables=ints(tables),
        sample_rows=ints(torch.zeros(1)),
        num_chunks=0,
    )
    return batch, sequences * each


def measure(options: argparse.Namespace, bandwidth: float) -> Iterator[Row]:
    batches = [int(size) for size in options.batch.split(",")]
    for name in options.shape.split(","):
        bench = ShapeBench(name, bandwidth)
        if options.tune_linear:
            for layer, rows in itertools.product(bench.sizes, batches):
                yield from bench.tune_linear(layer, rows)
            continue
        if options.tune_prefill:
            yield from bench.tune_prefill()
            continue
        if options.tune:
            for rows, context in itertools.product(batches, (_CONTEXT, 2048)):
                if rows * context <= 128 * 2048:
                    yield from bench.tune(rows, context)
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
    parser.add_argument("--apart", action="store_true", help="kernels that wait for each other")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    if options.apart:
        overlap.can_overlap = lambda _: False
    bandwidth = copy_bandwidth()
    rows = []
    if not options.json:
        print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.2f} TB/s, {_CONTEXT=}")
        print(f"{'shape':12}{'kernel':16}{'us':>10}{'floor':>10}{'share':>8}  case")
    for row in measure(options, bandwidth):
        rows.append(row)
        if not options.json:
            print(
                f"{row.shape:12}{row.kernel:16}{row.us:10.2f}{row.floor_us:10.2f}"
                f"{row.share_of_floor:8.2f}  {row.case}",
                flush=True,
            )
    if options.json:
        head = {"device": torch.cuda.get_device_name(), "copy_byte_s": round(bandwidth)}
        print(json.dumps({**head, "context": _CONTEXT, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
