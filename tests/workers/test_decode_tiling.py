"""How the keys of decodes are cut up among programs."""

from __future__ import annotations

import torch

from albireo.workers.kernels.cuda.decode_tiling import (
    ROUND,
    WARPS_OF_PROCESSOR,
    DecodeTiling,
    decode_tiling,
    num_splits,
)


def test_splits_fill_the_gpu_and_no_more() -> None:
    tiling = DecodeTiling(keys=64, step=32, programs=4, warps=4, stages=2)
    assert num_splits(8, 132, 4096, tiling) == 64
    assert num_splits(64 * 8, 132, 4096, tiling) == 1
    assert num_splits(16 * 8, 132, 4096, tiling) == 4
    assert num_splits(1, 132, 40, tiling) == 2
    assert num_splits(10_000, 10_000_000, 4096, tiling) == 1


def test_programs_of_a_cache_in_12_bits_fit_the_gpu_at_once() -> None:
    """Up to as many rows x KV heads as there is room for; beyond, its warps are all in use."""
    for head_dim, room in WARPS_OF_PROCESSOR.items():
        for row_heads in (1, 8, 16, 17, 64, 128, 132, 133, 264, 300, 512, 528, 1056, 2048, 5000):
            tiling = decode_tiling(head_dim, torch.uint8, row_heads, 132)
            splits = num_splits(row_heads, 132, 4096, tiling)
            assert tiling.keys == tiling.warps * ROUND and tiling.step % tiling.keys == 0
            programs = -(-row_heads * splits // 132)
            if row_heads <= 132 * 4:
                assert programs <= tiling.programs and programs * tiling.warps <= room
            else:
                assert splits == 1 and tiling.programs * tiling.warps >= room


def test_one_row_is_shared_by_most_of_the_gpu() -> None:
    tiling = decode_tiling(128, torch.uint8, 8, 132)
    assert num_splits(8, 132, 320, tiling) == 5 and num_splits(8, 132, 40960, tiling) == 16
