"""Paged attention and the cache write of the CPU kernels."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo.workers.kernels import create
from albireo.workers.kernels.cpu.kernels import CpuKernels
from albireo.workers.kernels.interface import KVLayer

from .paged import PagedSequences, attend, rotate

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
EPS = 1e-6


@functools.cache
def kernels(dtype: torch.dtype) -> CpuKernels:
    made = create("cpu", dtype, True)
    assert isinstance(made, CpuKernels)
    made.set_threads(1)
    return made


def empty_cache(k: CpuKernels, paged: PagedSequences, kv_heads: int, head_dim: int) -> KVLayer:
    """A cache full of NaN, as reused blocks may be."""
    kv = k.new_kv_layer(paged.num_blocks, paged.block_size, kv_heads, head_dim, k.dtype)
    kv.keys.fill_(float("nan"))
    kv.values.fill_(float("nan"))
    return kv


def rope_table(head_dim: int, length: int) -> torch.Tensor:
    angle = torch.outer(
        torch.arange(length), 10000.0 ** -(torch.arange(head_dim // 2) * 2 / head_dim)
    )
    return torch.cat([angle.cos(), angle.sin()], -1).float()


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int, int, int, list[int]]:
    """(query heads a KV head, KV heads, head size, block size, window, lengths)."""
    lengths = st.one_of(st.integers(1, 40), st.sampled_from([15, 16, 17, 63, 64, 65, 128, 150]))
    return (
        draw(st.integers(1, 8)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([8, 16, 24, 32, 64, 80, 96, 128])),
        draw(st.sampled_from([16, 16, 32])),
        draw(st.sampled_from([0, 0, 1, 13, 16, 70])),
        draw(st.lists(lengths, min_size=1, max_size=5)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(shape=shapes(), seed=st.integers(0, 1000))
def test_prefill_is_causal_attention(dtype: torch.dtype, shape: tuple, seed: int) -> None:
    share, kv_heads, head_dim, block_size, window, lengths = shape
    torch.manual_seed(seed)
    k, heads = kernels(dtype), share * kv_heads
    paged = PagedSequences(lengths, block_size, seed)
    kv = empty_cache(k, paged, kv_heads, head_dim)
    batch, rope = paged.everything(), rope_table(head_dim, 160)
    qkv = torch.randn(sum(lengths), (heads + 2 * kv_heads) * head_dim).to(dtype)

    q = k.rope_and_cache(qkv, heads, kv_heads, head_dim, None, None, EPS, rope, batch, kv)
    out = k.attention(q, kv, batch, head_dim**-0.5, window)

    parts = qkv.view(len(qkv), -1, head_dim).double()
    turned = rotate(parts[:, : heads + kv_heads], rope, batch.positions).to(dtype)
    torch.testing.assert_close(q, turned[:, :heads], atol=TOLERANCE[dtype], rtol=1e-2)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        expected = attend(
            q[rows],
            turned[rows, heads:],
            parts[rows, heads + kv_heads :],
            head_dim**-0.5,
            window,
        )
        got = out[rows].view(length, heads, head_dim).double()
        torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=1e-2)
        start += length


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(shape=shapes(), seed=st.integers(0, 1000))
def test_any_chunking_gives_the_same_bits(dtype: torch.dtype, shape: tuple, seed: int) -> None:
    """Prefill at once, in chunks, as decodes, alone or beside others: one result."""
    share, kv_heads, head_dim, block_size, window, lengths = shape
    torch.manual_seed(seed)
    chance = random.Random(seed)
    k, heads = kernels(dtype), share * kv_heads
    paged = PagedSequences(lengths, block_size, seed)
    rope = rope_table(head_dim, 160)
    total = sum(lengths)
    qkv = torch.randn(total, (heads + 2 * kv_heads) * head_dim).to(dtype)
    first_row = [sum(lengths[:s]) for s in range(len(lengths))]

    def forward(chunks: list[tuple[int, int, int]], kv: KVLayer) -> torch.Tensor:
        rows = torch.cat([torch.arange(n) + first_row[s] + at for s, at, n in chunks])
        batch = paged.batch(chunks)
        mine = qkv[rows].contiguous()
        q = k.rope_and_cache(mine, heads, kv_heads, head_dim, None, None, EPS, rope, batch, kv)
        result[rows] = k.attention(q, kv, batch, head_dim**-0.5, window)
        return result

    result = torch.zeros(total, heads * head_dim, dtype=dtype)
    kv = empty_cache(k, paged, kv_heads, head_dim)
    expected = forward([(s, 0, n) for s, n in enumerate(lengths)], kv).clone()

    result = torch.zeros(total, heads * head_dim, dtype=dtype)
    kv = empty_cache(k, paged, kv_heads, head_dim)
    done = [0] * len(lengths)
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        chunks = []
        for s, n in enumerate(lengths):
            take = min(n - done[s], chance.choice([0, 1, 1, 5, 16, 64, 150]))
            if take:
                chunks.append((s, done[s], take))
                done[s] += take
        if chunks:
            chance.shuffle(chunks)
            forward(chunks, kv)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_the_result(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    alone, team = create("cpu", dtype, False), create("cpu", dtype, False)
    alone.set_threads(1)
    team.set_threads(3)
    lengths = [70, 1, 33, 300]
    paged = PagedSequences(lengths, 16)
    batch, rope = paged.everything(), rope_table(64, 300)
    qkv = torch.randn(sum(lengths), (9 + 6) * 64).to(dtype)
    results = []
    for k in (alone, team):
        kv = k.new_kv_layer(paged.num_blocks, 16, 3, 64, dtype)
        for _ in range(5):
            q = k.rope_and_cache(qkv, 9, 3, 64, None, None, EPS, rope, batch, kv)
            results.append((q, k.attention(q, kv, batch, 0.125, 0)))
    for q, out in results[1:]:
        assert torch.equal(q, results[0][0])
        assert torch.equal(out, results[0][1])
    team.set_threads(1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_normalised_before_they_are_rotated(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    k = kernels(dtype)
    paged = PagedSequences([20], 16)
    batch, rope = paged.everything(), rope_table(32, 20)
    qkv = (3 * torch.randn(20, 8 * 32)).to(dtype)
    q_norm, k_norm = (torch.rand(32) + 0.5 for _ in range(2))
    kv = empty_cache(k, paged, 2, 32)
    q = k.rope_and_cache(qkv, 4, 2, 32, q_norm, k_norm, EPS, rope, batch, kv)
    out = k.attention(q, kv, batch, 32**-0.5, 0)

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()

    parts = qkv.view(20, 8, 32).double()
    expected_q = rotate(normed(parts[:, :4], q_norm), rope, batch.positions)
    expected_k = rotate(normed(parts[:, 4:6], k_norm), rope, batch.positions)
    torch.testing.assert_close(q.double(), expected_q, atol=TOLERANCE[dtype], rtol=1e-2)
    expected = attend(q, expected_k.to(dtype), parts[:, 6:], 32**-0.5, 0)
    got = out.view(20, 4, 32).double()
    torch.testing.assert_close(got, expected, atol=2 * TOLERANCE[dtype], rtol=1e-2)


def test_nan_stays_in_its_sequence() -> None:
    """A broken request shows as NaN in its own rows and nowhere else."""
    torch.manual_seed(0)
    k = kernels(torch.bfloat16)
    paged = PagedSequences([30, 30, 30], 16)
    batch, rope = paged.everything(), rope_table(64, 30)
    qkv = torch.randn(90, 3 * 64).bfloat16()
    kv = empty_cache(k, paged, 1, 64)
    q = k.rope_and_cache(qkv, 1, 1, 64, None, None, EPS, rope, batch, kv)
    expected = k.attention(q, kv, batch, 0.125, 0)
    qkv[40, :64] = float("nan")
    q = k.rope_and_cache(qkv, 1, 1, 64, None, None, EPS, rope, batch, kv)
    out = k.attention(q, kv, batch, 0.125, 0)
    assert out[40].isnan().all()
    others = torch.arange(90) != 40
    assert torch.equal(out[others], expected[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_minus_infinity_are_no_weights(dtype: torch.dtype) -> None:
    """A row that sees nothing else is NaN, as in PyTorch; those behind it are as they were."""
    torch.manual_seed(0)
    k = kernels(dtype)
    paged = PagedSequences([3], 16)
    batch, rope = paged.everything(), rope_table(16, 3)
    qkv = torch.randn(3, 3 * 16).to(dtype)
    qkv[0, :16], qkv[0, 16:32] = 1e20, -1e20
    kv = empty_cache(k, paged, 1, 16)
    q = k.rope_and_cache(qkv, 1, 1, 16, None, None, EPS, rope, batch, kv)
    out = k.attention(q, kv, batch, 0.25, 2)
    assert out[0].isnan().all()
    parts = qkv.double()
    turned = rotate(parts[:, :32].view(3, 2, 16), rope, batch.positions).to(dtype)
    last = attend(turned[2:, :1], turned[1:, 1:], parts[1:, 32:].view(2, 1, 16), 0.25, 0)
    torch.testing.assert_close(
        out[2:].view(1, 1, 16).double(), last, atol=TOLERANCE[dtype], rtol=1e-2
    )


def test_what_cannot_be_paged_is_refused() -> None:
    k = kernels(torch.bfloat16)
    with pytest.raises(ValueError, match=r"blocks of 8 tokens.*multiple of 16"):
        k.new_kv_layer(4, 8, 1, 64, torch.bfloat16)
    with pytest.raises(ValueError, match="head size 320"):
        k.new_kv_layer(4, 16, 1, 320, torch.bfloat16)
    with pytest.raises(ValueError, match=r"float32 for kernels of torch\.bfloat16"):
        k.new_kv_layer(4, 16, 1, 64, torch.float32)
