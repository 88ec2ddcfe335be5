"""Attention at every head size and group of query heads, of ragged lengths drawn anew each time.

A failure shows the seed: ATTENTION_SEED=N draws the same again.
"""

from __future__ import annotations

import importlib.util
import os
import random

import pytest
import torch

pytestmark = pytest.mark.gpu
if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)

from albireo.workers.kernels import create  # noqa: E402

from ..workers.cuda_kernel_checks import check_ragged_attention  # noqa: E402

GROUPS = range(1, 9)


@pytest.fixture
def chance() -> random.Random:
    seed = int(os.environ.get("ATTENTION_SEED") or random.SystemRandom().randrange(1 << 31))
    print(f"ATTENTION_SEED={seed}")
    return random.Random(seed)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bfloat16_and_a_cache_of_12_bits(head_dim: int, group: int, chance: random.Random) -> None:
    both = [
        create("cuda", torch.bfloat16, False, kv_cache_dtype=cache) for cache in ("model", "e4m7")
    ]
    check_ragged_attention(both, torch.bfloat16, head_dim, group, chance)


@pytest.mark.parametrize("group", GROUPS)
def test_float32(group: int, chance: random.Random) -> None:
    """At one of the head sizes each: what compiles takes the time."""
    k = create("cuda", torch.float32, False)
    check_ragged_attention([k], torch.float32, 64 if group % 2 else 128, group, chance)
