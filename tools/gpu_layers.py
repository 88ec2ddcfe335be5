"""Layers of a model on the GPU, in the shapes of its steps, and what a launch of them takes.

For gpu_kernel_bench.py and gpu_tunings.py.  A kernel runs once a layer, for LAYERS layers with
weights and KV of their own (far more than the L2 cache holds), in one CUDA graph; a figure is
that of a replay (gpu_replay.py), per launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from gpu_replay import Cost, replay

from albireo.node.kv_cache import e4m7_kv_bytes
from albireo.workers.engine.batch import StepBatch
from albireo.workers.kernels import create
from albireo.workers.kernels.interface import KVLayer

_BLOCK = 16
CONTEXT = 320
_MAX_LEN = 4096
LAYERS = 10
DTYPE = torch.bfloat16


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
    mj: float = 0.0


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, dtype=DTYPE, device="cuda") * scale


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / (replay(lambda: target.copy_(source)).us * 1e-6)


class ShapeBench:
    """A model's layers on the GPU.  e4m7, kv_cache_dtype: see EngineConfig."""

    def __init__(
        self, name: str, bandwidth: float, e4m7: str = "off", kv_cache_dtype: str = "model"
    ) -> None:
        self.name, self.shape, self.bandwidth = name, SHAPES[name], bandwidth
        self.kernels = k = create("cuda", DTYPE, False, e4m7, kv_cache_dtype)
        self.kv_token_bytes = self.shape.kv_heads * self.shape.head_dim * 4
        if kv_cache_dtype == "e4m7":
            self.kv_token_bytes = e4m7_kv_bytes(self.kv_token_bytes, self.shape.head_dim)
        shape = self.shape
        sizes = {
            "qkv": (shape.qkv_width, shape.hidden),
            "o": (shape.hidden, shape.q_width),
            "gate_up": (2 * shape.intermediate, shape.hidden),
            "down": (shape.hidden, shape.intermediate),
        }
        self.linears = {
            name: [
                k.pack_linear(random(n, m, scale=m**-0.5), None, gated=name == "gate_up")
                for _ in range(LAYERS)
            ]
            for name, (n, m) in sizes.items()
        }
        head = random(shape.vocab, shape.hidden, scale=shape.hidden**-0.5)
        self.head = k.pack_linear(head, None, torch.float32)
        self.sizes = {**sizes, "lm_head": (shape.vocab, shape.hidden)}
        width = 2.0 if e4m7 == "off" else 1.5
        self.weight_bytes = {name: width * n * m for name, (n, m) in self.sizes.items()}
        self.norm = torch.randn(shape.hidden, device="cuda")
        self.head_norm = torch.randn(shape.head_dim, device="cuda")
        self.rope = torch.randn(_MAX_LEN, shape.head_dim, device="cuda")

    def row(self, kernel: str, case: str, cost: Cost, size: float) -> Row:
        floor, us = size / self.bandwidth * 1e6, cost.us
        return Row(
            self.name, kernel, case, round(us, 2), round(floor, 2), round(floor / us, 3),
            round(cost.mj, 2),
        )  # fmt: skip

    def caches(self, blocks: int) -> list[KVLayer]:
        shape, made = self.shape, []
        for _ in range(LAYERS):
            kv = self.kernels.new_kv_layer(blocks, _BLOCK, shape.kv_heads, shape.head_dim, DTYPE)
            if kv.keys.dtype == torch.uint8:
                # All bytes are numbers, but for the powers of two at a block's end.
                memory = kv.keys.random_(256).view(blocks, -1)
                memory[:, -4 * _BLOCK * shape.kv_heads :].view(DTYPE).fill_(1.0)
            else:
                kv.keys.normal_()
                kv.values.normal_()
            made.append(kv)
        return made

    def decode(self, rows: int) -> Iterator[Row]:
        """Every kernel of a step of `rows` decodes, a layer, and the step."""
        k, shape, case = self.kernels, self.shape, f"B={rows}"
        batch, blocks = scattered(rows, CONTEXT - 1, 1)
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

        kv_bytes = rows * CONTEXT * self.kv_token_bytes
        weights = self.weight_bytes
        calls: list[tuple[str, Callable[[int], object], float]] = [
            ("add_rms_norm", norm, 4 * x.nbytes),
            ("qkv", gemm("qkv", x), weights["qkv"] + x.nbytes + qkv.nbytes),
            ("rope_and_cache", rope, 2 * qkv.nbytes),
            ("attention", attend, kv_bytes + 2 * q.nbytes),
            ("o", gemm("o", attended), weights["o"] + attended.nbytes + x.nbytes),
            ("gate_up, silu", gated, weights["gate_up"] + x.nbytes + inner.nbytes),
            ("down", gemm("down", inner), weights["down"] + inner.nbytes + x.nbytes),
            ("layer", layer, sum(weights.values()) - weights["lm_head"] + kv_bytes),
        ]
        costs = {}
        for name, call, size in calls:
            costs[name] = self.each(call)
            yield self.row(name, case, costs[name], size)
        head = replay(lambda: k.linear(x, self.head))
        yield self.row("lm_head", case, head, weights["lm_head"])
        size = calls[-1][-1] * shape.layers + weights["lm_head"]
        yield self.row("step", case, costs["layer"] * shape.layers + head, size)

    def prefill(self, sequences: int, tokens: int) -> Row:
        """Attention of whole prompts; its floor is that of 800 TFLOP/s."""
        shape = self.shape
        batch, blocks = scattered(sequences, 0, tokens)
        batch.num_chunks = sequences
        caches = self.caches(blocks)
        q = random(sequences * tokens, shape.heads, shape.head_dim)
        cost = self.each(
            lambda i: self.kernels.attention(q, caches[i], batch, shape.head_dim**-0.5, 0)
        )
        flop = 2 * sequences * tokens * (tokens + 1) * shape.q_width
        case = f"{sequences} x {tokens}: {flop / cost.us / 1e6:.0f} TFLOP/s"
        return self.row("prefill", case, cost, flop / 800e12 * self.bandwidth)

    def each(self, call: Callable[[int], object]) -> Cost:
        """Of a call on each of the layers, one after the other."""

        def run() -> None:
            for i in range(LAYERS):
                call(i)

        return replay(run) * (1 / LAYERS)


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
