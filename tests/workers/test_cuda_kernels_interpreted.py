"""The CUDA kernels in Triton's interpreter, on CPU tensors; tests/gpu runs them for real."""

from __future__ import annotations

import functools
import random

import pytest
import torch

from .interpreted import use_interpreter

use_interpreter()

from albireo.workers.kernels.cuda import e4m7_gemm, hopper_gemm  # noqa: E402
from albireo.workers.kernels.cuda.few_rows import FewRowsTiling, few_rows_tiling  # noqa: E402
from albireo.workers.kernels.cuda.gemv import GemvTiling, gemv_tiling  # noqa: E402
from albireo.workers.kernels.cuda.hopper import HopperTiling  # noqa: E402
from albireo.workers.kernels.cuda.hopper_gemm import hopper_tiling  # noqa: E402
from albireo.workers.kernels.cuda.kernels import CudaKernels  # noqa: E402

from . import cuda_kernel_checks as checks  # noqa: E402
from .cuda_kernel_checks import Conversation, Shape  # noqa: E402
from .mixture_check import MixtureCheck  # noqa: E402

DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.bfloat16, id="bfloat16"),
]


@functools.cache
def kernels(
    dtype: torch.dtype, batch_invariant: bool = False, e4m7_cache: bool = False
) -> CudaKernels:
    device = torch.device("cpu")
    return CudaKernels(dtype, batch_invariant, device, e4m7_cache=e4m7_cache)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [16, 576, 1027])
def test_norm(dtype: torch.dtype, hidden: int) -> None:
    checks.check_norm(kernels(dtype), dtype, 3, hidden)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 100, 1536])
def test_activations(dtype: torch.dtype, width: int) -> None:
    checks.check_activations(kernels(dtype), dtype, 2, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [24, 2100])
def test_embed(dtype: torch.dtype, hidden: int) -> None:
    checks.check_embed(kernels(dtype), dtype, hidden)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(6))
def test_drawn_shapes(dtype: torch.dtype, seed: int) -> None:
    checks.check_drawn_shapes(kernels(dtype, bool(seed % 2)), dtype, random.Random(seed), 400)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("invariant", [False, True])
def test_linear(dtype: torch.dtype, invariant: bool) -> None:
    checks.check_linear(kernels(dtype, invariant), dtype, 72, 90)
    checks.check_linear(kernels(dtype, invariant), dtype, 33, 64, torch.float32)


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("n", "width", "tiling"),
    [
        (24, 128, GemvTiling(8, 32, 4, 3)),
        (21, 128, GemvTiling(4, 128, 4, 1, once=True)),
        (5, 90, GemvTiling(1, 32, 4, 4)),
        (7, 40, GemvTiling(2, 64, 4, 1)),
    ],
    ids=str,
)
def test_one_row(n: int, width: int, tiling: GemvTiling, out: torch.dtype) -> None:
    checks.check_gemv(torch.device("cpu"), n, width, tiling, out)


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("rows", "n", "width", "tiling"),
    [
        (2, 128, 256, FewRowsTiling(64, 64, 1, 3)),
        (17, 64, 256, FewRowsTiling(32, 64, 3, 3)),
        (64, 32, 160, FewRowsTiling(16, 32, 5, 2)),
    ],
    ids=str,
)
def test_few_rows(rows: int, n: int, width: int, tiling: FewRowsTiling, out: torch.dtype) -> None:
    checks.check_few_rows(torch.device("cpu"), rows, n, width, tiling, out)


@pytest.mark.parametrize(
    ("n", "k", "rows", "splits", "stages"),
    [
        # Layers of Qwen3-8B: qkv, o, gate|up, down; those of a half.
        (6144, 4096, 64, 1, 6), (4096, 4096, 8, 2, 6), (24576, 4096, 64, 1, 3),
        (24576, 4096, 8, 1, 5), (4096, 12288, 33, 2, 6), (3072, 4096, 16, 2, 6),
        # One that has few tiles, and few rounds: no share is empty.
        (1024, 2048, 32, 4, 6), (1024, 1024, 2, 4, 6), (576, 1536, 2, 6, 6),
    ],
)  # fmt: skip
def test_tiling_of_few_rows(n: int, k: int, rows: int, splits: int, stages: int) -> None:
    assert few_rows_tiling(n, k, rows) == FewRowsTiling(64, 128, splits, stages)


def test_what_few_rows_leaves_to_cublas() -> None:
    assert few_rows_tiling(1000, 1024, 8) is None and few_rows_tiling(1024, 576, 8) is None


@pytest.mark.parametrize(
    ("k", "rows", "columns"),
    [(4096, 1, 4096), (12288, 1, 4096), (3072, 1, 4096), (2048, 2, 2048), (1024, 4, 1024),
     (576, 4, 1024), (90, 8, 128)],
)  # fmt: skip
def test_tiling_of_one_row(k: int, rows: int, columns: int) -> None:
    assert gemv_tiling(k) == GemvTiling(rows, columns, warps=4, stages=1, once=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "lengths"),
    [
        (Shape(4, 2, 16), [1, 16, 17, 33]),
        (Shape(8, 1, 64), [40, 3]),
        (Shape(9, 3, 64, window=13), [50, 1, 20]),
        (Shape(7, 1, 32), [65, 64]),
        (Shape(2, 2, 128, block_size=32), [40, 5]),
        (Shape(5, 1, 16, block_size=48), [100, 49]),
        (Shape(4, 2, 96), [33, 17, 1]),
        (Shape(3, 3, 80, window=13), [40, 16]),
        (Shape(4, 1, 256, window=24), [50, 3]),
    ],
    ids=str,
)
def test_steps_of_chunks_and_decodes(dtype: torch.dtype, shape: Shape, lengths: list[int]) -> None:
    conversation = Conversation(shape, dtype, lengths, seed=1)
    steps = conversation.cut([1, 5, 16, 40])
    normed = shape.heads % 2 == 0
    checks.check_attention(kernels(dtype), conversation, steps, normed)


@pytest.mark.parametrize(
    ("shape", "lengths"),
    [
        (Shape(8, 2, 64), [40, 3]),
        (Shape(9, 3, 64, window=13), [50, 1, 20]),
        (Shape(4, 1, 128, block_size=32), [80, 5]),
        (Shape(4, 1, 256, window=24), [50, 3]),
    ],
    ids=str,
)
def test_steps_with_a_cache_of_12_bits(shape: Shape, lengths: list[int]) -> None:
    conversation = Conversation(shape, torch.bfloat16, lengths, seed=1)
    steps = conversation.cut([1, 5, 16, 40])
    normed = shape.heads % 2 == 0
    k = kernels(torch.bfloat16, e4m7_cache=True)
    got = checks.check_attention(k, conversation, steps, normed)
    # Nothing but its smallest numbers differs from what bfloat16 holds.
    _, same = conversation.run(kernels(torch.bfloat16), steps, normed)
    assert (got.double() - same.double()).norm() / same.double().norm() < 1e-3


def test_the_smallest_numbers_of_a_cache_of_12_bits_count() -> None:
    checks.check_small_numbers_count(kernels(torch.bfloat16, e4m7_cache=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 16, 70])
def test_prompts_and_their_last_token(dtype: torch.dtype, window: int) -> None:
    conversation = Conversation(Shape(3, 1, 16, window=window), dtype, [130, 1, 64, 17], 3)
    checks.check_attention(kernels(dtype), conversation, conversation.whole())
    checks.check_attention(kernels(dtype), conversation, conversation.decode_last())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 48])
def test_a_long_row_is_shared_by_many_programs(dtype: torch.dtype, head_dim: int) -> None:
    """More splits than are added up at once, and beside them a row with one."""
    k = kernels(dtype)
    conversation = Conversation(Shape(3, 1, head_dim), dtype, [300, 2], 0)
    checks.check_attention(k, conversation, conversation.decode_last())
    checks.check_attention(k, conversation, conversation.decode_last())


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_chunking_gives_the_same_bits_when_asked(dtype: torch.dtype) -> None:
    conversation = Conversation(Shape(4, 2, 32, window=20), dtype, [60, 33, 5], 1)
    k = kernels(dtype, batch_invariant=True)
    whole = checks.check_attention(k, conversation, conversation.whole())
    cut = checks.check_attention(k, conversation, conversation.cut([1, 5, 16, 30]))
    assert torch.equal(cut, whole)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("padding", [(7, 0, 0), (0, 3, 2), (70, 140, 5)], ids=str)
def test_a_padded_step_is_the_same_step(padding: tuple[int, int, int], invariant: bool) -> None:
    """Spare rows, empty chunks, more of them than are looked at at once, and empty decodes."""
    conversation = Conversation(Shape(3, 1, 16, window=20), torch.float32, [60, 17, 1], 4)
    k = kernels(torch.float32, invariant)
    steps = [([(0, 0, 41), (1, 0, 16)], 2), ([(2, 0, 1), (0, 41, 19), (1, 16, 1)], 2)]
    padded = checks.check_attention(k, conversation, steps, padding=padding)
    if invariant:
        assert torch.equal(padded, checks.check_attention(k, conversation, conversation.whole()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    checks.check_nan_stays_in_its_row(kernels(dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_linear(dtype: torch.dtype) -> None:
    checks.check_gated_linear(kernels(dtype), dtype, 48, 32, 70)


@pytest.mark.parametrize(
    ("n", "k", "rows", "tiling"),
    [
        (24576, 4096, 65, HopperTiling(128, 3, 1)),
        (24576, 4096, 193, HopperTiling(256, 3, 1)),
        (28672, 4096, 128, HopperTiling(128, 4, 1)),
        (28672, 4096, 129, None),  # More tiles than there is room for.
        (4096, 12288, 128, HopperTiling(128, 1, 2)),
        (4096, 12288, 129, HopperTiling(192, 1, 2)),
        (5120, 13824, 128, HopperTiling(128, 2, 3)),
        (5120, 13824, 129, None),  # Sums of three shares of k.
        (12288, 4096, 129, None),
        (24576, 4096, 257, None),
        (4096, 4096, 128, HopperTiling(128, 1, 2)),
        (4096, 4096, 96, None),  # A small layer, and a tile with few rows.
        (4096, 4096, 129, None),
        (151936, 4096, 128, None),
        (24576, 4100, 128, None),
    ],
)
def test_tiling_of_a_decode_batch(n: int, k: int, rows: int, tiling: HopperTiling | None) -> None:
    assert hopper_tiling(n, k, rows) == tiling


@pytest.mark.parametrize(
    ("n", "rows", "tiling"),
    [
        (24576, 384, HopperTiling(192, 3, 1)),
        (24576, 512, HopperTiling(256, 3, 1)),
        (24576, 2048, HopperTiling(256, 3, 1)),
        (24576, 2049, None),
        (24576, 260, None),  # Rows that are not there.
        (28672, 512, None),  # A third round with few programs.
        (12288, 512, HopperTiling(256, 3, 1)),
        (12288, 256, None),  # One tile of rows.
    ],
)
def test_tiling_of_a_prompts_rows(n: int, rows: int, tiling: HopperTiling | None) -> None:
    assert hopper_tiling(n, 4096, rows, gated=True) == tiling
    if rows > 256:
        assert hopper_tiling(n, 4096, rows) is None


def test_stages_leave_room_for_all_that_a_program_has() -> None:
    for rows, groups in ((64, 2), (128, 4), (256, 1), (256, 2), (256, 3)):
        for kernel in (
            hopper_gemm.kernel_arguments(HopperTiling(rows, groups, 1), None),
            e4m7_gemm.kernel_arguments(HopperTiling(rows, groups, 1), None, torch.bfloat16),
        ):
            _, defines, _, _, shared_bytes, _ = kernel
            stages = dict(define.split("=") for define in defines)
            assert int(stages["INPUT_STAGES"]) >= 3 and int(stages["WEIGHT_STAGES"]) >= 4
            assert shared_bytes <= 227 << 10


def test_an_empty_step_launches_nothing() -> None:
    k = kernels(torch.float32)
    empty, weight = torch.empty(0, 32), torch.ones(32)
    assert k.rms_norm(empty, weight, 1e-6).shape == (0, 32)
    assert k.silu_mul(empty).shape == (0, 16)
    assert k.embed(torch.empty(0, dtype=torch.int32), torch.ones(4, 8), 0).shape == (0, 8)


def test_what_cannot_be_computed_is_refused() -> None:
    k = kernels(torch.bfloat16)
    with pytest.raises(ValueError, match=r"blocks of 8 tokens.*multiple of 16"):
        k.new_kv_layer(4, 8, 1, 64, torch.bfloat16)
    for head_dim in (8, 72, 272):
        with pytest.raises(ValueError, match=f"head size {head_dim}: .* multiples of 16 from 16"):
            k.new_kv_layer(4, 16, 1, head_dim, torch.bfloat16)
    with pytest.raises(ValueError, match=r"float32 for kernels of torch\.bfloat16"):
        k.new_kv_layer(4, 16, 1, 64, torch.float32)
    with pytest.raises(ValueError, match=r"no CUDA kernels for torch\.float16"):
        CudaKernels(torch.float16, False, torch.device("cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("rows", [1, 90])
def test_experts(dtype: torch.dtype, invariant: bool, rows: int) -> None:
    k = kernels(dtype, invariant)
    check = MixtureCheck(k, experts=5, chosen=3, hidden=72, size=40, seed=rows)
    for normalise in (False, True):
        got = check.run(rows, normalise)
        if invariant:
            alone = check.run(slice(rows - 1, rows), normalise)
            assert torch.equal(alone[0], got[-1])


def test_a_nan_row_of_experts_stays_in_its_row() -> None:
    check = MixtureCheck(kernels(torch.float32), experts=4, chosen=2, hidden=64, size=32, seed=0)
    expected = check.run(9, True)
    check.scores[4], check.x[4] = float("nan"), float("nan")
    got = check.run(9, True, compare=False)
    assert got[4].isnan().all()
    others = torch.arange(9) != 4
    assert torch.equal(got[others], expected[others])
