"""The GEMM of weights in 12 bits against float64, for every way to cut it up, on a Hopper GPU."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from albireo.workers.kernels import create  # noqa: E402
from albireo.workers.kernels.cuda import e4m7_gemm as e4m7_gemm_module  # noqa: E402
from albireo.workers.kernels.cuda import linear as linear_module  # noqa: E402
from albireo.workers.kernels.cuda import nvrtc  # noqa: E402
from albireo.workers.kernels.cuda.e4m7 import pack  # noqa: E402
from albireo.workers.kernels.cuda.e4m7_gemm import (  # noqa: E402
    e4m7_gemm,
    e4m7_tiling,
    kernel_arguments,
    supported,
)
from albireo.workers.kernels.cuda.hopper import HopperTiling  # noqa: E402
from albireo.workers.kernels.cuda.linear import NarrowLinear, PackedLinear  # noqa: E402

from ..workers import e4m7_reference  # noqa: E402
from .gemm_reference import (  # noqa: E402
    DEVICE,
    check_in_a_graph,
    differences,
    expected,
    random,
)

TILINGS = [
    HopperTiling(rows, groups, splits)
    for rows, groups, splits in itertools.product(
        (8, 16, 32, 64, 128, 192, 256), (1, 2, 3, 4), (1, 2, 3)
    )
    if (groups < 4 or rows <= 128) and (splits == 1 or (groups + splits) % 2)
]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability(0) != (9, 0),
        reason="needs an H100 or H200",
    ),
]


def check(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tiling: HopperTiling,
    activation: str | None, out: torch.dtype = torch.bfloat16, float32_error: float = 1e-5,
) -> None:  # fmt: skip
    """Also that a second run has the same bits."""
    packed = pack(weight, activation is not None)
    assert packed is not None
    torch.cuda.synchronize()  # Weights are there before a kernel of theirs comes up.
    got = e4m7_gemm(x, packed, bias, tiling, activation, out)
    wide = expected(x, weight, bias, activation)
    assert got.shape == wide.shape and got.dtype == out
    error = (got.double() - wide).norm() / wide.norm()
    assert error < (5e-3 if out == torch.bfloat16 else float32_error), error
    again = e4m7_gemm(x, packed, bias, tiling, activation, out)
    if differ := differences(again, got):
        third = e4m7_gemm(x, packed, bias, tiling, activation, out)
        errors = [float((y.double() - wide).norm() / wide.norm()) for y in (got, again, third)]
        raise AssertionError(f"{differ}; a third run: {differences(third, got)}; {errors=}")


def test_it_is_supported() -> None:
    assert supported(DEVICE)


def test_what_does_not_work_is_told_and_weights_stay(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object) -> None:
        raise RuntimeError("CUDA: CUDA_ERROR_INVALID_IMAGE")

    monkeypatch.setattr(e4m7_gemm_module, "_trial", refuse)
    assert not supported.__wrapped__(DEVICE)
    assert "weights stay bfloat16: CUDA: CUDA_ERROR_INVALID_IMAGE" in caplog.text
    monkeypatch.setattr(linear_module, "e4m7_supported", lambda device: False)
    large = random(4096, 2048)
    beside = create("cuda", torch.bfloat16, False, "beside").pack_linear(large, None)
    assert beside.narrow is None
    with pytest.raises(RuntimeError, match=r"--e4m7-weights only: .* leave the option out"):
        create("cuda", torch.bfloat16, False, "only").pack_linear(random(64, 64), None)


@pytest.fixture(scope="module")
def compiled() -> None:
    """All that test_every_tiling needs, on all cores."""
    kinds = [(activation, torch.bfloat16) for activation in ("silu", "gelu", None)]
    kernels = [
        kernel_arguments(tiling, *kind)
        for tiling in TILINGS
        for kind in (*kinds, (None, torch.float32))
        if kind[0] != ("gelu" if tiling.groups % 2 else "silu")
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda kernel: nvrtc.compiled(*kernel[:2]), kernels))


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_every_tiling(compiled: None, tiling: HopperTiling) -> None:
    torch.manual_seed(tiling.rows)
    # The last tile is not whole, the last rows of x are not there, and shares of k differ.
    n, k = 16 * 67, 64 * 13
    weight, bias, x = random(n, k) / k**0.5, random(n), random(max(1, tiling.rows - 5), k)
    check(x, weight, bias, tiling, None)
    check(x, weight, bias, tiling, "silu" if tiling.groups % 2 else "gelu")
    check(x, weight, None, tiling, None, torch.float32)


@pytest.mark.parametrize("tiling", [(16, 2, 1), (128, 4, 1), (256, 1, 1), (256, 2, 1), (256, 3, 1)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_several_tiles_of_rows(tiling: tuple[int, int, int], activation: str | None) -> None:
    torch.manual_seed(tiling[0] + tiling[1])
    n, k = 16 * 67, 64 * 13
    weight, bias = random(n, k) / k**0.5, random(n)
    for count in (tiling[0] + 1, 2 * tiling[0], 3 * tiling[0] - 5):
        check(random(count, k), weight, bias, HopperTiling(*tiling), activation)


def test_bits_are_the_same_where_two_processes_share_the_gpu() -> None:
    command = [sys.executable, "-m", "tests.gpu.same_bits", "5"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [each.communicate(timeout=120)[1] for each in both]
    assert [each.returncode for each in both] == [0, 0], said


def test_layers() -> None:
    for (n, k), rows in itertools.product(
        ((24576, 4096), (4096, 12288), (6144, 4096), (3072, 4096), (4096, 1024)),
        (1, 7, 64, 100, 190, 256, 300, 1030),
    ):
        activation = "silu" if n == 24576 else None
        check(random(rows, k), random(n, k) / k**0.5, None, e4m7_tiling(n, k, rows), activation)


def test_inputs_may_be_small() -> None:
    """Sums are 2^112 times too small until the end, and float32 has no bits below 2^-149: with
    inputs of 2^-20 a sum of 4,096 loses 2.2e-5 of its size, a hundredth of what bfloat16 rounds."""
    weight = random(256, 4096) / 64
    for power, error in ((-14, 1e-5), (-17, 1e-5), (-20, 3e-5)):
        x = random(40, 4096) * 2.0**power
        check(x, weight, None, HopperTiling(64, 2, 1), None, torch.float32, error)


def test_weights_are_used_as_they_are_kept() -> None:
    """Also the small ones: x picks single columns, and bfloat16 rounds nothing of a weight."""
    weight = random(256, 128)
    weight[:, ::3] *= 2.0 ** torch.randint(-24, 0, (256, 43), device=DEVICE)
    packed = pack(weight)
    assert packed is not None
    x = torch.eye(128, device=DEVICE, dtype=torch.bfloat16)
    got = e4m7_gemm(x, packed, None, HopperTiling(128, 1, 1), None, torch.float32)
    assert torch.equal(got.t(), e4m7_reference.unpack(packed))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("n", "k"), [(16, 64), (16 * 67, 64 * 13), (4096, 12288), (24576, 4096)])
def test_packing(n: int, k: int, gated: bool) -> None:
    """Every byte, also of rows of zeros and of what is much smaller than the rest of its row."""
    weight = random(n, k)
    weight *= 2.0 ** torch.randint(-90, 13, (n, 1), device=DEVICE)
    weight[:, ::3] *= 2.0 ** torch.randint(-24, 0, weight[:, ::3].shape, device=DEVICE)
    weight[n // 2] = 0
    packed, wanted = pack(weight, gated), e4m7_reference.pack(weight, gated)
    assert packed is not None and wanted is not None
    assert torch.equal(packed.scales, wanted.scales)
    assert torch.equal(packed.blocks, wanted.blocks)


def test_beside_and_only() -> None:
    """Each takes the weight that it should, and says what will be read."""
    torch.manual_seed(0)
    weight, gated, head = random(4096, 2048) / 45, random(4096, 2048) / 45, random(5008, 2048) / 45
    for mode in ("beside", "only"):
        k = create("cuda", torch.bfloat16, False, mode)
        one, two = k.pack_linear(weight, None), k.pack_linear(gated, None, gated=True)
        logits = k.pack_linear(head, None, torch.float32)
        assert isinstance(one, PackedLinear if mode == "beside" else NarrowLinear)
        assert one.narrow is not None
        few, many = k.reads(one, 64), k.reads(one, 500)
        assert few is not None and few.shape == (64 * 32, 6144)
        assert few.data_ptr() == one.narrow.blocks.data_ptr()
        assert many is not None and (many.data_ptr() == few.data_ptr()) == (mode == "only")
        for rows in (1, 33, 128, 256, 700):
            x = random(rows, 2048)
            for found, wanted in (
                (k.linear(x, one), expected(x, weight, None, None)),
                (k.gated_linear(x, two, "silu"), expected(x, gated, None, "silu")),
                (k.linear(x, logits), expected(x, head, None, None)),
            ):
                assert (found.double() - wanted).norm() / wanted.norm() < 5e-3
        assert k.linear(random(0, 2048), one).shape == (0, 4096)


def test_what_does_not_fit_stays_bfloat16() -> None:
    small = create("cuda", torch.bfloat16, False, "beside").pack_linear(random(64, 128), None)
    assert small.narrow is None  # It would never be read.
    k = create("cuda", torch.bfloat16, False, "only")
    assert isinstance(k.pack_linear(random(40, 128), None), PackedLinear)
    unusual = random(64, 128)
    unusual[0, 0] = float("inf")
    assert isinstance(k.pack_linear(unusual, None), PackedLinear)
    assert isinstance(
        create("cuda", torch.bfloat16, True, "only").pack_linear(random(64, 128), None),
        PackedLinear,
    )


def test_in_a_graph_behind_a_kernel_that_writes_its_input() -> None:
    weight, tiling = random(2048, 1024) / 32, HopperTiling(32, 3, 3)
    packed = pack(weight, True)
    assert packed is not None
    check_in_a_graph(lambda y: e4m7_gemm(y, packed, None, tiling, "silu"), weight, 20)
