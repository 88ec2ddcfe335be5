"""What must hold of CudaKernels, on a GPU as in Triton's interpreter.

Each check draws its data from a seed and compares with ReferenceKernels on the
CPU.  Caches are full of NaN before they are written, as reused blocks may be (in 12 bits their
powers are).
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from albireo.workers.engine.batch import StepBatch
from albireo.workers.kernels.cuda.few_rows import FewRowsTiling, few_rows
from albireo.workers.kernels.cuda.gemv import GemvTiling, gemv
from albireo.workers.kernels.interface import Kernels, KVLayer

from .paged import PagedSequences, ints, poison
from .reference_kernels import ReferenceKernels

EPS = 1e-6
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

Chunk = tuple[int, int, int]
"""(sequence, first position, tokens)"""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Heads of a rank and where they look."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int = 16
    window: int = 0

    @property
    def qkv_width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


def close(got: torch.Tensor, expected: torch.Tensor, scale: float = 1.0) -> None:
    """Within the rounding of the result's dtype, for values of about `scale`."""
    relative = TOLERANCE[got.dtype]
    torch.testing.assert_close(
        got.cpu().float(), expected.float(), rtol=relative, atol=relative * scale
    )


def rope_table(head_dim: int, length: int) -> torch.Tensor:
    angle = torch.outer(
        torch.arange(length), 10000.0 ** -(torch.arange(head_dim // 2) * 2 / head_dim)
    )
    return torch.cat([angle.cos(), angle.sin()], -1).float()


def on_device(batch: StepBatch, device: torch.device) -> StepBatch:
    """The same batch with its tensors on `device`."""
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    moved = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in fields.items()}
    return StepBatch(**moved)


def empty_cache(k: Kernels, paged: PagedSequences, shape: Shape, dtype: torch.dtype) -> KVLayer:
    kv = k.new_kv_layer(paged.num_blocks, shape.block_size, shape.kv_heads, shape.head_dim, dtype)
    poison(kv)
    return kv


def check_norm(k: Kernels, dtype: torch.dtype, rows: int, hidden: int) -> None:
    torch.manual_seed(hidden)
    reference = ReferenceKernels()
    x, residual = ((2 * torch.randn(rows, hidden)).to(dtype) for _ in range(2))
    weight = torch.rand(hidden) + 0.5
    there = [t.to(k.device, copy=True) for t in (x, residual, weight)]
    close(k.rms_norm(there[0], there[2], EPS), reference.rms_norm(x, weight, EPS))
    got = k.add_rms_norm(there[0], there[1], there[2], EPS)
    expected = reference.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(there[1].cpu(), residual)
    close(got, expected)
    assert torch.equal(k.rms_norm(there[1][-1:], there[2], EPS)[0], got[-1])
    inner = torch.rand(hidden) - 0.5
    got = k.add_rms_norm(there[0], there[1], there[2], EPS, inner.to(k.device))
    expected = reference.add_rms_norm(x, residual, weight, EPS, inner)
    close(there[1], residual)
    close(got, expected)


def check_activations(k: Kernels, dtype: torch.dtype, rows: int, width: int) -> None:
    torch.manual_seed(width)
    gate_up = (8 * torch.randn(rows, 2 * width)).to(dtype)
    extremes = torch.tensor([-float("inf"), -200.0, 0.0, 200.0, float("inf"), float("nan")])
    gate_up[0, :6] = extremes.to(dtype)
    gate, up = gate_up.double().chunk(2, 1)
    for apply, expected in (
        (k.silu_mul, F.silu(gate) * up),
        (k.gelu_mul, F.gelu(gate, approximate="tanh") * up),
    ):
        got = apply(gate_up.to(k.device)).cpu()
        assert torch.equal(got.isnan(), expected.isnan())
        finite = expected.isfinite()
        close(got[finite], expected[finite])
        assert torch.equal(got.isfinite(), finite)


def check_gated_linear(k: Kernels, dtype: torch.dtype, n: int, width: int, rows: int) -> None:
    torch.manual_seed(n)
    weight, x = torch.randn(n, width) / width**0.5, torch.randn(rows, width)
    weight, x = weight.to(dtype), x.to(dtype)
    packed = k.pack_linear(weight, None)
    gate, up = (x.double() @ weight.double().T).chunk(2, 1)
    for activation, expected in (
        ("silu", F.silu(gate) * up),
        ("gelu", F.gelu(gate, approximate="tanh") * up),
    ):
        got = k.gated_linear(x.to(k.device), packed, activation)
        assert got.shape == expected.shape and got.dtype == dtype
        error = (got.cpu().double() - expected).norm() / expected.norm()
        assert error < (1e-5 if dtype == torch.float32 else 5e-3)


def check_embed(k: Kernels, dtype: torch.dtype, hidden: int) -> None:
    table = torch.randn(10, hidden).to(dtype)
    got = k.embed(ints([100, 109, 99, 110, 0, 105]).to(k.device), table.to(k.device), 100)
    expected = torch.zeros(6, hidden, dtype=dtype)
    expected[[0, 1, 5]] = table[[0, 9, 5]]
    assert torch.equal(got.cpu(), expected)


def check_drawn_shapes(k: Kernels, dtype: torch.dtype, chance: random.Random, most: int) -> None:
    """All that takes rows as they are, of up to `most` numbers."""
    hidden, n = (8 * chance.randint(2, most // 8) for _ in range(2))
    check_norm(k, dtype, chance.randint(1, 150), hidden)
    check_activations(k, dtype, chance.randint(1, 150), chance.randint(3, most))
    check_embed(k, dtype, hidden)
    rows = (1, chance.randint(2, 64), chance.randint(65, 300))
    check_linear(k, dtype, n, hidden, chance.choice((None, torch.float32)), rows)


def check_linear(
    k: Kernels,
    dtype: torch.dtype,
    n: int,
    width: int,
    out: torch.dtype | None = None,
    many: Sequence[int] = (1, 5, 70),
) -> None:
    """Also that a row alone gives the same bits, where the kernels say so."""
    torch.manual_seed(n)
    weight, bias = torch.randn(n, width).to(dtype), torch.randn(n).to(dtype)
    for with_bias in (False, True):
        for rows in many:
            x = torch.randn(rows, width).to(dtype)
            packed = k.pack_linear(weight, bias if with_bias else None, out)
            got = k.linear(x.to(k.device), packed)
            assert got.dtype == (out or dtype)
            wide = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
            error = (got.cpu().double() - wide).norm() / wide.norm()
            assert error < (1e-5 if got.dtype == torch.float32 else 5e-3)
            if k.batch_invariant:
                alone = k.linear(x[-1:].to(k.device), packed)
                assert torch.equal(alone[0], got[-1])


def check_gemv(
    device: torch.device, n: int, width: int, tiling: GemvTiling, out: torch.dtype
) -> None:
    run = functools.partial(gemv, out_dtype=out, tiling=tiling)
    _check_kernel(run, device, 1, n, width, out)


def check_few_rows(
    device: torch.device, rows: int, n: int, width: int, tiling: FewRowsTiling, out: torch.dtype
) -> None:
    run = functools.partial(few_rows, out_dtype=out, tiling=tiling)
    _check_kernel(run, device, rows, n, width, out)


def _check_kernel(
    run: Callable[..., torch.Tensor],
    device: torch.device,
    rows: int,
    n: int,
    width: int,
    out: torch.dtype,
) -> None:
    """Also that a second run has the same bits, and that an infinity stays in its output."""
    torch.manual_seed(n)
    x, weight, bias = (torch.randn(s).bfloat16() for s in ((rows, width), (n, width), (n,)))
    weight[n // 2, width // 2] = float("inf")
    there = [t.to(device) for t in (x, weight, bias)]
    for with_bias in (False, True):
        got = run(there[0], there[1], there[2] if with_bias else None)
        assert got.shape == (rows, n) and got.dtype == out
        again = run(there[0], there[1], there[2] if with_bias else None)
        assert torch.equal(again, got)
        wide = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
        finite = wide.isfinite()
        assert torch.equal(got.cpu().isfinite(), finite)
        got, wide = got.cpu().double()[finite], wide[finite]
        assert (got - wide).norm() / wide.norm() < (1e-5 if out == torch.float32 else 5e-3)


class Conversation:
    """Sequences that advance in random steps through one layer's cache write and attention.

    qkv of every token is drawn once, so any cut into steps must give the same.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, lengths: Sequence[int], seed: int) -> None:
        torch.manual_seed(seed)
        self.shape, self.dtype, self.lengths, self.seed = shape, dtype, lengths, seed
        self.paged = PagedSequences(lengths, shape.block_size, seed)
        self.qkv = torch.randn(sum(lengths), shape.qkv_width).to(dtype)
        self.norms = [torch.rand(shape.head_dim) + 0.5 for _ in range(2)]
        self.rope = rope_table(shape.head_dim, max(lengths))
        self.first_row = [sum(lengths[:s]) for s in range(len(lengths))]

    def run(
        self,
        k: Kernels,
        steps: Sequence[tuple[Sequence[Chunk], int]],
        normed: bool = False,
        padding: tuple[int, int, int] = (0, 0, 0),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(queries, outputs) of all tokens; a step is (chunks, number of them that are prefill).

        padding: see PagedSequences.padded; what pads is NaN.
        """
        shape, device = self.shape, k.device
        kv = empty_cache(k, self.paged, shape, self.dtype)
        q_norm, k_norm = (n.to(device) for n in self.norms) if normed else (None, None)
        qkv, rope = self.qkv.to(device), self.rope.to(device)
        queries = torch.empty(len(qkv), shape.heads, shape.head_dim, dtype=self.dtype)
        outputs = torch.empty(len(qkv), shape.heads * shape.head_dim, dtype=self.dtype)
        for chunks, num_chunks in steps:
            rows = torch.cat([torch.arange(n) + self.first_row[s] + at for s, at, n in chunks])
            batch = on_device(self.paged.batch(chunks), device)
            batch.num_chunks = num_chunks
            batch = self.paged.padded(batch, *padding)
            spare = torch.full_like(qkv[:1], float("nan")).expand(padding[0], -1)
            q = k.rope_and_cache(
                torch.cat([qkv[rows.to(device)], spare]), shape.heads, shape.kv_heads,
                shape.head_dim, q_norm, k_norm, EPS, rope, batch, kv,
            )  # fmt: skip
            if kv.wide is not None:  # Another layer's.
                poison(kv.wide)
            out = k.attention(q, kv, batch, shape.head_dim**-0.5, shape.window)
            queries[rows], outputs[rows] = q[: len(rows)].cpu(), out[: len(rows)].cpu()
        return queries, outputs

    def whole(self) -> list[tuple[list[Chunk], int]]:
        """All at once."""
        chunks = [(s, 0, n) for s, n in enumerate(self.lengths)]
        return [(chunks, len(chunks))]

    def cut(self, sizes: Sequence[int]) -> list[tuple[list[Chunk], int]]:
        """Random steps of chunks of some of `sizes`; single tokens are mostly decodes."""
        chance = random.Random(self.seed)
        done, steps = [0] * len(self.lengths), []
        while any(d < n for d, n in zip(done, self.lengths, strict=True)):
            chunks, decodes = [], []
            for s, n in enumerate(self.lengths):
                take = min(n - done[s], chance.choice([0, *sizes]))
                if take:
                    is_decode = take == 1 and chance.random() < 0.8
                    (decodes if is_decode else chunks).append((s, done[s], take))
                    done[s] += take
            if chunks or decodes:
                chance.shuffle(chunks)
                steps.append(([*chunks, *decodes], len(chunks)))
        return steps

    def decode_last(self) -> list[tuple[list[Chunk], int]]:
        """Everything but the last token at once, then all last tokens as decodes."""
        first = [(s, 0, n - 1) for s, n in enumerate(self.lengths) if n > 1]
        last = [(s, n - 1, 1) for s, n in enumerate(self.lengths)]
        return [(first, len(first)), (last, 0)] if first else [(last, 0)]

    def mixed(self, chance: random.Random) -> list[tuple[list[Chunk], int]]:
        """Prompts up to about a block's end; some go on by chunks, others decode; their rest."""
        size = self.shape.block_size
        first, chunks, decodes, rest = [], [], [], []
        for s in chance.sample(range(len(self.lengths)), len(self.lengths)):
            length = self.lengths[s]
            end = size * chance.randint(1, length // size + 1) + chance.choice((-1, 0, 1))
            start = min(end, length - 1)
            first.append((s, 0, start))
            if len(chunks) <= len(decodes):
                chunks.append((s, start, length - start))
            else:
                decodes.append((s, start, 1))
                rest.append((s, start + 1, length - start - 1))
        first, rest = ([piece for piece in pieces if piece[2]] for pieces in (first, rest))
        steps = [(first, len(first)), ([*chunks, *decodes], len(chunks)), (rest, len(rest))]
        return [step for step in steps if step[0]]


def check_attention(
    k: Kernels,
    conversation: Conversation,
    steps: Sequence,
    normed: bool = False,
    padding: tuple[int, int, int] = (0, 0, 0),
) -> torch.Tensor:
    """Against the reference; returns the outputs."""
    found = conversation.run(k, steps, normed, padding)
    _compare(found, conversation.run(ReferenceKernels(), conversation.whole(), normed))
    return found[1]


def _compare(
    found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Queries and outputs, as Conversation.run returns them."""
    for got, wanted in zip(found, expected, strict=True):
        error = (got.double() - wanted.double()).norm() / wanted.double().norm()
        assert error < (1e-5 if got.dtype == torch.float32 else 5e-3)
        torch.testing.assert_close(got, wanted, rtol=0.02, atol=4 * TOLERANCE[got.dtype])


def ragged_lengths(chance: random.Random, count: int, most: int, block_size: int) -> list[int]:
    """At least four: a single token, the last of a block, none behind it and one; others random."""
    ends = [block_size * chance.randint(1, most // block_size) + n for n in (-1, 0, 1)]
    lengths = [1, *ends, *(chance.randint(1, most) for _ in range(count - 4))]
    chance.shuffle(lengths)
    return lengths


def check_ragged_attention(
    kernels: Sequence[Kernels],
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    chance: random.Random,
    kv_heads: Sequence[int] = (4, 8),
    most: int = 300,
    row_heads: int = 256,
) -> None:
    """Lengths and what is fed of them are drawn; prompts, decodes, few and many, and both at once.

    kernels: each is run on all of it.  kv_heads: of which one is drawn.  row_heads: decodes times
    KV heads that are few, and that many exceed.
    """
    shape = Shape(0, chance.choice(kv_heads), head_dim)
    shape = dataclasses.replace(shape, heads=group * shape.kv_heads)
    normed = chance.random() < 0.5
    few = ragged_lengths(chance, 8, most, shape.block_size)
    many = row_heads // shape.kv_heads + chance.randint(1, 9)
    for lengths in (few, ragged_lengths(chance, many, most // 4, shape.block_size)):
        conversation = Conversation(shape, dtype, lengths, chance.randrange(1 << 31))
        expected = conversation.run(ReferenceKernels(), conversation.whole(), normed)
        for k in kernels:
            for steps in (conversation.decode_last(), conversation.mixed(chance)):
                _compare(conversation.run(k, steps, normed), expected)


def check_small_numbers_count(k: Kernels) -> None:
    """Of a cache in 12 bits: numbers 2^16 times smaller than a row's largest, which have few bits
    of mantissa left, and which the tensor cores get as subnormal ones."""
    torch.manual_seed(0)
    tokens, head_dim = 40, 64
    q, key, value = torch.randn(3, tokens, head_dim)
    q, key, value = q * 2.0**14, key * 2.0**-16, value * 2.0**-16
    q[:, 0], key[:, 0], value[:, 0] = 0.0, 1.0, 1.0
    qkv = torch.cat([q, key, value], 1).bfloat16()
    q, key, value = qkv.double().chunk(3, 1)
    paged = PagedSequences([tokens], 16, 0)
    batch = paged.batch([(0, 0, tokens)])
    batch.positions.zero_()  # Nothing is turned: the largest numbers stay where they are.
    kv = k.new_kv_layer(paged.num_blocks, 16, 1, head_dim, torch.bfloat16)
    rope = rope_table(head_dim, 1).to(k.device)
    there = on_device(batch, k.device)
    queries = k.rope_and_cache(
        qkv.to(k.device), 1, 1, head_dim, None, None, EPS, rope, there, kv
    )  # fmt: skip
    chunk = k.attention(queries, kv, there, 1.0, 0)[-1:]
    last = on_device(paged.batch([(0, tokens - 1, 1)]), k.device)
    last.num_chunks = 0
    decode = k.attention(queries[-1:].contiguous(), kv, last, 1.0, 0)
    expected = torch.softmax(q[-1:] @ key.T, 1) @ value
    for got in (chunk, decode):
        error = (got.cpu().double() - expected)[:, 1:].norm() / expected[:, 1:].norm()
        assert error < 0.03


def check_nan_stays_in_its_row(k: Kernels, dtype: torch.dtype) -> None:
    """A broken query shows as NaN in its own row and nowhere else."""
    shape = Shape(2, 1, 64)
    conversation = Conversation(shape, dtype, [30, 30, 30], 0)
    for steps in (conversation.whole(), conversation.decode_last()):
        _, expected = conversation.run(k, steps)
        kept = conversation.qkv[59].clone()
        conversation.qkv[59, : 2 * 64] = float("nan")
        _, got = conversation.run(k, steps)
        conversation.qkv[59] = kept
        assert got[59].isnan().all()
        others = torch.arange(90) != 59
        assert torch.equal(got[others], expected[others])
