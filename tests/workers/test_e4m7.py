"""Weights of 12 bits: what they keep, where memory has them, and how layers of them are cut up."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from albireo.workers.kernels.cuda import e4m7
from albireo.workers.kernels.cuda.e4m7 import BLOCK_BYTES, fits, pack
from albireo.workers.kernels.cuda.e4m7_gemm import e4m7_tiling, ever_faster, faster
from albireo.workers.kernels.cuda.hopper import PROGRAMS, HopperTiling

from . import e4m7_reference
from .e4m7_reference import unpack
from .kernel_on_cpu import kernels_on_cpu


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Packing by e4m7_pack.cu, as on a GPU."""
    with kernels_on_cpu(e4m7, tmp_path_factory.mktemp("kernel")):
        yield


def weights(n: int, k: int) -> torch.Tensor:
    """Rows of different sizes, with some weights much smaller than their row's."""
    torch.manual_seed(n)
    weight = torch.randn(n, k) * torch.logspace(-20, 4, n).unsqueeze(1)
    weight[:, ::5] *= 2.0 ** torch.randint(-24, 0, (n, len(range(0, k, 5))))
    return weight.bfloat16()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("n", "k", "gated"),
    [(64, 64, False), (64, 64, True), (208, 192, False), (160, 128, True), (16, 320, False)],
)
def test_large_weights_are_exact_and_small_ones_nearly(n: int, k: int, gated: bool) -> None:
    weight = weights(n, k)
    packed = pack(weight, gated)
    assert packed is not None
    assert packed.blocks.shape == (-(-n // 64), k // 64, BLOCK_BYTES)
    wanted = e4m7_reference.pack(weight, gated)
    assert wanted is not None and torch.equal(packed.scales, wanted.scales)
    assert torch.equal(packed.blocks, wanted.blocks)
    found, wide = unpack(packed), weight.float()
    largest = wide.abs().amax(1, keepdim=True)
    # The exponent of the largest is what counts, not its mantissa.
    exact = wide.abs() >= largest * 2.0**-13
    assert torch.equal(found[exact], wide[exact])
    assert ((found - wide).abs() <= largest * 2.0**-22).all()
    assert not exact.all() and (found != wide).any()


@pytest.mark.usefixtures("on_cpu")
def test_rows_of_zeros_and_of_the_smallest_numbers() -> None:
    weight = torch.zeros(32, 64).bfloat16()
    weight[1, 3] = 1.0
    weight[2] = 2.0**-130  # Below bfloat16's normal numbers.
    packed = pack(weight)
    assert packed is not None
    found = unpack(packed)
    assert torch.equal(found[[0, 1, 3]], weight[[0, 1, 3]].float())
    assert found[2].abs().max() < 2.0**-120


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 2.0**16])
def test_numbers_that_are_none_or_huge_are_not_packed(value: float) -> None:
    weight = weights(64, 64)
    weight[7, 9] = value
    assert pack(weight) is None


def test_what_fits() -> None:
    assert fits(torch.empty(48, 128, dtype=torch.bfloat16))
    assert not fits(torch.empty(48, 96, dtype=torch.bfloat16))
    assert not fits(torch.empty(40, 128, dtype=torch.bfloat16))
    assert not fits(torch.empty(48, 128))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("gated", [False, True])
def test_memory_has_them_as_a_threads_registers(gated: bool) -> None:
    """PTX ISA's figure of matrix A: lane, register and half of it to row and column."""
    n, k = 128, 128
    weight = weights(n, k)
    packed = pack(weight, gated)
    assert packed is not None
    wanted = unpack(packed).double()
    order = packed.blocks.split((4096, 2048), -1)
    lows, highs = (
        part.contiguous().view(torch.int32).view(2, 2, 4, 128, -1).tolist() for part in order
    )
    for block, columns, step, thread in itertools.product((0, 1), (0, 1), range(4), range(128)):
        (high,) = highs[block][columns][step][thread]
        registers = unpacked(lows[block][columns][step][thread], high)
        warp, lane = divmod(thread, 32)
        for place, number in enumerate(torch.tensor(registers).short().view(torch.bfloat16)):
            register, half = divmod(place, 2)
            row = 64 * block + 16 * warp + lane // 4 + 8 * (register % 2)
            column = 64 * columns + 16 * step + lane % 4 * 2 + half + 8 * (register // 2)
            if gated:  # Eight of the first half, eight of the second.
                turn, place_in_turn = divmod(row, 16)
                row = turn * 8 + place_in_turn % 8 + (64 if place_in_turn >= 8 else 0)
            assert number.double() * packed.scales[row] == wanted[row, column]


def unpacked(low: list[int], high: int) -> list[int]:
    """Eight of bfloat16, as e4m7_gemm.cu does it: a turn, a mask and the bytes' places."""
    numbers = []
    for word, turn in zip(low, (0, 4), strict=True):
        bits = high & 0xFFFFFFFF
        signs = ((bits >> turn | bits << 32 - turn) & 0x87878787).to_bytes(9, "little")[:4]
        lows = (word & 0xFFFFFFFF).to_bytes(4, "little")
        numbers += [int.from_bytes((lows[i], signs[i]), "little", signed=True) for i in range(4)]
    return numbers


@pytest.mark.parametrize(
    ("n", "k", "rows", "tiling"),
    [
        (24576, 4096, 1, HopperTiling(8, 3, 1)),
        (4096, 12288, 1, HopperTiling(8, 2, 3)),
        (6144, 4096, 16, HopperTiling(16, 3, 3)),
        (4096, 4096, 64, HopperTiling(64, 2, 3)),
        (12288, 4096, 128, HopperTiling(128, 3, 2)),
        (28672, 4096, 65, HopperTiling(128, 4, 1)),
        (151936, 4096, 128, HopperTiling(128, 3, 1)),  # In rounds.
        (4096, 64, 8, HopperTiling(8, 1, 1)),  # Nothing of k to share.
        (24576, 4096, 192, HopperTiling(192, 3, 1)),
        (4096, 12288, 256, HopperTiling(256, 1, 2)),
        (24576, 4096, 2048, HopperTiling(256, 2, 1)),
        (4096, 4096, 512, HopperTiling(128, 2, 1)),
        (6144, 4096, 1024, HopperTiling(128, 3, 1)),
    ],
)
def test_tilings(n: int, k: int, rows: int, tiling: HopperTiling) -> None:
    assert e4m7_tiling(n, k, rows) == tiling


@pytest.mark.parametrize("rows", [1, 9, 64, 100, 128, 190, 256, 300, 2048, 8192])
def test_programs_of_a_cluster_have_room_at_once(rows: int) -> None:
    for n in range(16, 40_000, 1008):
        tiling = e4m7_tiling(n, 4096, rows)
        tiles, outputs, splits = tiling.grid(rows, n)
        assert splits == 1 or tiles * outputs * splits <= PROGRAMS[splits]
        assert tiling.rows * tiles >= rows and tiling.outputs * outputs >= n


def test_few_rows_are_faster() -> None:
    def most(n: int, k: int) -> list[int]:
        """Where `faster` changes, beginning with rows of 1."""
        rows = [faster(n, k, rows) for rows in range(1, 300)]
        return [place + 1 for place in range(1, len(rows)) if rows[place] != rows[place - 1]]

    assert faster(24576, 4096, 1) and most(24576, 4096) == [257]
    assert faster(4096, 12288, 1) and most(4096, 12288) == [257]
    assert faster(12288, 4096, 1) and most(12288, 4096)[-1] == 193  # Two programs share k.
    assert faster(28672, 4096, 1) and most(28672, 4096) == [129]  # 150 tiles of 192 outputs.
    assert faster(151936, 4096, 1) and most(151936, 4096) == [257]  # Six rounds of them.
    assert faster(128256, 4096, 1) and most(128256, 4096) == [193]  # The sixth is a small one.
    assert faster(4096, 4096, 1) and most(4096, 4096) == [113]
    assert not faster(3072, 4096, 1) and most(3072, 4096) == [2, 65]
    assert not faster(4096, 1024, 1) and most(4096, 1024) == []
    assert ever_faster(3072, 4096) and not ever_faster(4096, 1024)
