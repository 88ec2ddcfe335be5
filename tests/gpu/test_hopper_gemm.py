"""The GEMM of decode batches against float64, for every way to cut it up, on a Hopper GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from albireo.workers.kernels.cuda import hopper_gemm as hopper_gemm_module  # noqa: E402
from albireo.workers.kernels.cuda import nvrtc  # noqa: E402
from albireo.workers.kernels.cuda.hopper import HopperTiling  # noqa: E402
from albireo.workers.kernels.cuda.hopper_gemm import (  # noqa: E402
    hopper_gemm,
    hopper_tiling,
    supported,
)

from .gemm_reference import DEVICE, check_in_a_graph, expected, random  # noqa: E402

NOTHING = ('extern "C" __global__ void nothing() {}', (), "nothing", 32, 0, (1, 1, 1))
"""A CompiledKernel's arguments."""
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability(0) != (9, 0),
        reason="needs an H100 or H200",
    ),
]


def check(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tiling: HopperTiling,
    activation: str | None,
) -> None:  # fmt: skip
    """Also that a second run has the same bits."""
    got = hopper_gemm(x, weight, bias, tiling, activation)
    wide = expected(x, weight, bias, activation)
    assert got.shape == wide.shape and got.dtype == torch.bfloat16
    assert (got.double() - wide).norm() / wide.norm() < 5e-3
    assert torch.equal(hopper_gemm(x, weight, bias, tiling, activation), got)


def test_it_is_supported() -> None:
    assert supported(DEVICE)


def test_what_does_not_work_is_told_and_left_to_cublas(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object) -> None:
        raise RuntimeError("CUDA: CUDA_ERROR_INVALID_IMAGE")

    monkeypatch.setattr(hopper_gemm_module, "_trial", refuse)
    assert not supported.__wrapped__(DEVICE)
    assert "CUDA_ERROR_INVALID_IMAGE" in caplog.text and "cuBLAS" in caplog.text


@pytest.mark.parametrize(
    ("rows", "groups", "splits", "activations"),
    [
        *((128, groups, splits, (None, "silu")) for groups in (1, 2, 3, 4) for splits in (1, 3)),
        *((256, groups, splits, (None, "silu")) for groups in (1, 2, 3) for splits in (1, 2, 3)),
        (64, 2, 2, (None, "gelu")),
        (192, 3, 1, (None, "gelu")),
        (192, 1, 2, (None, "gelu")),
    ],
)
def test_every_tiling(
    rows: int, groups: int, splits: int, activations: tuple[str | None, ...]
) -> None:
    torch.manual_seed(rows)
    # The last tile is not whole, the last rows of x are not there, and shares of k differ.
    n, k = 16 * 67, 64 * 13
    weight, bias, x = random(n, k) / k**0.5, random(n), random(rows - 5, k)
    tiling = HopperTiling(rows, groups, splits)
    for activation in activations:
        check(x, weight, None, tiling, activation)
        check(x, weight, bias, tiling, activation)


@pytest.mark.parametrize(
    ("n", "k", "activation"),
    [(24576, 4096, "silu"), (4096, 12288, None), (12288, 4096, "silu"), (28672, 4096, "silu")],
)
def test_layers(n: int, k: int, activation: str | None) -> None:
    torch.manual_seed(n)
    weight = random(n, k) / k**0.5
    for rows in (65, 128, 193, 256):
        if tiling := hopper_tiling(n, k, rows):
            check(random(rows, k), weight, random(n), tiling, activation)


@pytest.mark.parametrize(
    ("rows", "groups", "splits"),
    [(64, 2, 1), (128, 4, 1), (128, 2, 2), (192, 3, 1), (256, 3, 1), (256, 2, 3)],
)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_several_tiles_of_rows(rows: int, groups: int, splits: int, activation: str | None) -> None:
    torch.manual_seed(rows)
    n, k = 16 * 67, 64 * 13
    weight, bias = random(n, k) / k**0.5, random(n)
    for count in (rows + 1, 2 * rows, 3 * rows - 5):
        check(random(count, k), weight, bias, HopperTiling(rows, groups, splits), activation)


@pytest.mark.parametrize("rows", [384, 510, 1024, 2048])
def test_a_prompts_rows(rows: int) -> None:
    torch.manual_seed(rows)
    n, k = 24576, 4096
    weight, x = random(n, k) / k**0.5, random(rows, k)
    tiling = hopper_tiling(n, k, rows, gated=True)
    assert tiling is not None and tiling.rows < rows
    check(x, weight, None, tiling, "silu")


def test_in_a_graph_behind_a_kernel_that_writes_its_input() -> None:
    weight, tiling = random(2048, 1024) / 32, HopperTiling(256, 3, 2)
    check_in_a_graph(lambda y: hopper_gemm(y, weight, None, tiling, "silu"), weight, 200)


def test_what_is_kept_and_not_whole_is_compiled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALBIREO_CACHE_DIR", str(tmp_path))
    nvrtc.CompiledKernel(*NOTHING)
    (kept,) = (tmp_path / "nvrtc").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(b"")
    nvrtc.CompiledKernel(*NOTHING)
    assert kept.read_bytes() == whole


def test_a_kernel_that_cannot_be_kept_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").touch()
    monkeypatch.setenv("ALBIREO_CACHE_DIR", str(tmp_path / "full"))
    nvrtc.CompiledKernel(*NOTHING).launch((1, 1, 1))
    torch.cuda.synchronize()


def test_a_text_that_does_not_compile_is_told() -> None:
    with pytest.raises(RuntimeError, match="undefined"):
        nvrtc.compiled("__device__ int f() { return nothing; }", [])
