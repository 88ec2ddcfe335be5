"""Attention of decodes in CUDA C++, on the CPU; tests/gpu runs it on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from albireo.workers.engine.batch import StepBatch
from albireo.workers.kernels.cuda import e4m7_decode as module
from albireo.workers.kernels.cuda.decode_tiling import COUNTERS, DecodeTiling
from albireo.workers.kernels.cuda.e4m7_decode import e4m7_decode, shared_bytes
from albireo.workers.kernels.interface import KVLayer

from .kernel_on_cpu import KernelOnCpu, kernels_on_cpu


@pytest.fixture
def on_cpu(tmp_path: Path) -> Iterator[None]:
    with kernels_on_cpu(module, tmp_path):
        yield


def packed(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bfloat16 [.., head_dim] of no more than 14 powers of two -> low bytes, high ones, powers."""
    bits = numbers.view(torch.int16).int()
    exponent = bits >> 7 & 255
    top = exponent.amax(-1, keepdim=True)
    exponent = exponent - top + 15
    assert int(exponent.min()) > 0
    short = exponent << 7 | bits & 127
    sign, half = bits >> 15 & 1, numbers.shape[-1] // 2
    first, second = short[..., :half] >> 8, short[..., half:] >> 8
    high = sign[..., :half] << 7 | second << 4 | sign[..., half:] << 3 | first
    return (short & 255).to(torch.uint8), high.to(torch.uint8), (top << 7).to(torch.int16)


def cache_of(keys: torch.Tensor, values: torch.Tensor) -> KVLayer:
    """Of [blocks, kv_heads, block_size, head_dim], as e4m7_cache.py lays it out."""
    blocks, *shape, head_dim = keys.shape
    parts = [packed(keys), packed(values)]
    pieces = [part.reshape(blocks, -1) for low, high, _ in parts for part in (low, high)]
    powers = torch.cat([power for *_, power in parts], -1).reshape(blocks, -1)
    both = torch.cat([*pieces, powers.view(torch.uint8)], 1)
    both = both.reshape(blocks, *shape, 3 * head_dim + 4)
    return KVLayer(both, both)


def spoil(cache: KVLayer, blocks: torch.Tensor, lowest: int, length: int) -> None:
    """What a sequence does not see of its blocks: all bits are set, so that powers are none."""
    _, kv_heads, block_size, width = cache.keys.shape
    head_dim = (width - 4) // 3
    for at, block in enumerate(blocks.tolist()):
        tokens = torch.arange(block_size) + at * block_size
        hidden = (tokens < lowest) | (tokens >= length)
        sizes = [head_dim, head_dim // 2, head_dim, head_dim // 2, 4]
        pieces = cache.keys[block].view(-1).split([kv_heads * block_size * n for n in sizes])
        for piece, size in zip(pieces, sizes, strict=True):
            piece.view(kv_heads, block_size, size)[:, hidden] = 255


def numbers(*shape: int) -> torch.Tensor:
    """Normal ones, none much smaller than the others."""
    drawn = torch.randn(shape)
    return (drawn + drawn.sign() * 0.01).bfloat16()


def check(
    heads: int, kv_heads: int, head_dim: int, lengths: list[int], splits: int, warps: int,
    window: int = 0, block_size: int = 16,
) -> None:  # fmt: skip
    """Sequences of these lengths behind two chunks, against plain attention."""
    torch.manual_seed(heads)
    each = [-(-n // block_size) for n in lengths]
    blocks, chunks, rows = sum(each) + 1, 2, len(lengths) + 7
    keys, values = (numbers(blocks, kv_heads, block_size, head_dim) for _ in range(2))
    keys[:, 0], values[:, 0] = keys[:, 0] * 2.0**20, values[:, 0] * 2.0**-30
    q = numbers(rows, heads, head_dim)
    q.view(rows, kv_heads, -1)[:, 0] *= (
        2.0**-13
    )  # Large scores, so that later ones exceed the first.
    owned = torch.randperm(blocks - 1).split(each)
    tables = torch.full((len(lengths) + chunks, max(each)), blocks - 1)
    for sequence, some in enumerate(owned):
        tables[chunks + sequence, : len(some)] = some
    first = rows - len(lengths)

    def ints(values: list[int] | torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(values).to(torch.int32)

    nothing = ints([0])
    batch = StepBatch(
        nothing, nothing, nothing, ints([0, 1, *range(first, rows + 1)]), ints([1, 6, *lengths]),
        ints(range(chunks + len(lengths))), ints(tables), nothing, chunks,
    )  # fmt: skip
    counters = torch.zeros(COUNTERS, dtype=torch.int32)
    shape = len(lengths), kv_heads, splits, heads // kv_heads
    tiling = DecodeTiling(16 * warps, 16 * warps, 8 // warps, warps, 2)
    lowest = [max(length - window, 0) if window else 0 for length in lengths]
    cache = cache_of(keys, values)
    for seen in zip(owned, lowest, lengths, strict=True):
        spoil(cache, *seen)
    for last_first in (False, True):
        KernelOnCpu.last_first = last_first
        out = torch.full((rows, heads * head_dim), float("nan")).bfloat16()
        sums, summary = (torch.full((*shape, n), float("nan")) for n in (head_dim, 2))
        e4m7_decode(
            q, cache, out, sums, summary, counters, batch, len(lengths), splits,
            tiling, 132, head_dim**-0.5, window,
        )  # fmt: skip
        assert not counters.any() and out[:first].isnan().all()
        each = zip(out[first:], q[first:], owned, lowest, lengths, strict=True)
        for row, query, some, begin, end in each:
            if not end:  # As what pads a captured size, but that this has a row.
                assert row.isnan().all()
                continue
            key, value = (
                x[some].double().transpose(0, 1).flatten(1, 2)[:, begin:end] for x in (keys, values)
            )
            query = query.double().view(kv_heads, -1, head_dim)
            weights = torch.softmax(query @ key.transpose(1, 2) * head_dim**-0.5, -1)
            wanted = (weights @ value).reshape(kv_heads, -1)
            got = row.double().view(kv_heads, -1)
            assert ((got - wanted).norm(dim=1) / wanted.norm(dim=1)).max() < 5e-3


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("warps", [1, 2, 4])
def test_splits_and_warps_add_up(warps: int) -> None:
    for splits in (1, 3, 9):
        check(4, 1, 128, [1, 16, 0, 64, 150], splits, warps)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 2, 256), (12, 1, 64)])
def test_shapes_of_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    """Of more than eight heads a KV head two programs share the heads."""
    check(heads, kv_heads, head_dim, [40, 17], 2, 2)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("block_size", [16, 32])
def test_windows(block_size: int) -> None:
    check(2, 2, 64, [5, 60, 130], 2, 2, 50, block_size)


def test_what_spreads_programs_leaves_room_for_as_many() -> None:
    for head_dim in (64, 128, 256):
        for warps, room in ((8, 1), (4, 1), (4, 2), (2, 2)):
            taken = shared_bytes(head_dim, warps, room) + 1024
            assert room * taken <= 228 << 10 < (room + 1) * taken
        assert shared_bytes(head_dim, 2, 0) == 2 * 8 * (head_dim + 8 + 2) * 4
