"""Sizes of a GPU's steps: those of graphs, those whose kernels are loaded, and the worst ones."""

from __future__ import annotations

import itertools
from dataclasses import replace

import msgspec
import pytest

from albireo.workers.engine.cuda.mixed_sizes import (
    MixedSize,
    captured_mixed_sizes,
    loaded_rows,
    most_rows,
)
from albireo.workers.engine.cuda.profile_plans import profile_plans

from .engine_story import CONFIG, CUDA


@pytest.mark.parametrize("seqs", [1, 3, 8, 40, 256, 1000])
@pytest.mark.parametrize("rows", [1, 24, 64, 500, 2048, 8192])
def test_sizes_of_mixed_steps(rows: int, seqs: int) -> None:
    sizes = captured_mixed_sizes(rows, seqs)
    assert sizes == sorted(set(sizes))
    assert len(sizes) <= (44 if rows <= 2048 else 60)
    for size in sizes:
        assert size.decodes == size.logits <= min(size.rows, seqs)
        assert size.chunks <= seqs
    # The largest holds any step of so many rows, but for more prompts than it has places.
    most = min(rows, seqs)
    assert sizes[-1].holds(MixedSize(rows, sizes[-1].chunks, most, most))
    assert sizes[0].rows == min(rows, 64)


def test_graphs_of_mixed_steps_end_where_launching_is_faster() -> None:
    def products(hidden: int, inner: int, layers: int, kv_heads: int = 8) -> int:
        shape = replace(
            CONFIG, hidden_size=hidden, intermediate_size=inner, num_layers=layers,
            num_heads=hidden // 128, num_kv_heads=kv_heads, head_dim=128,
        )  # fmt: skip
        return shape.layer_products()

    small, qwen3_8b = CONFIG.layer_products(), products(4096, 12288, 36)
    assert most_rows(small, 1, 4096, 2048) == 4096
    assert most_rows(small, 1, 16384, 2048) == 8192
    assert most_rows(small, 1, 24, 2048) == 24
    assert most_rows(qwen3_8b, 1, 4096, 8192) == 1024
    # Ranks have sums to launch, too, of 16 MiB at most.
    assert most_rows(qwen3_8b, 2, 4096, 2048) == 3072
    assert most_rows(qwen3_8b, 2, 4096, 8192) == 2048
    assert most_rows(qwen3_8b, 2, 1000, 8192) == 1000
    assert most_rows(small, 8, 8192, 2048) == 8192
    # Layers of more than any size is for.
    assert most_rows(products(16384, 53248, 2), 1, 4096, 32768) == 64
    assert most_rows(products(8192, 49152, 80), 1, 4096, 16384) == 128


@pytest.mark.parametrize("most", [1, 5, 8, 13, 512, 2048, 2049, 8192, 1 << 20])
def test_the_sizes_whose_kernels_are_loaded_are_dense(most: int) -> None:
    sizes = loaded_rows(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most
    assert len(sizes) < 250
    for before, size in itertools.pairwise([0, *(each for each in sizes if each <= 8192)]):
        assert size - before <= (8 if size <= 512 else 16 if size <= 2048 else 128)


@pytest.mark.parametrize("seqs,tokens,length", [(3, 24, 64), (1, 1, 2), (4, 4, 5), (8, 512, 40)])
def test_the_worst_steps_use_all_rows_and_all_slots(seqs: int, tokens: int, length: int) -> None:
    engine = msgspec.structs.replace(
        CUDA, max_num_seqs=seqs, max_num_batched_tokens=tokens, max_model_len=length
    )
    plans = profile_plans(engine)
    assert max(len(plan.chunk_token) for plan in plans) == min(tokens, seqs * (length - 1))
    assert max(len(plan.chunk) + len(plan.decode) for plan in plans) == min(seqs, tokens)
    for plan in plans:
        assert len(plan.chunk_token) + len(plan.decode) <= tokens
        assert (plan.append[:, 2] < engine.num_blocks).all()
        assert (plan.append[:, 1] < -(-length // engine.block_size)).all()
