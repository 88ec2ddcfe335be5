"""Tensors that get memory by and by, over a range that only counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from albireo.workers.kernels.cuda.growing import GrowingMemory

HOST = torch.device("cpu")


class CountedRange:
    """Full of ones, as memory is that somebody had before."""

    granularity = 96

    def __init__(self, nbytes: int, first: int, device: torch.device) -> None:
        self.all = torch.ones(nbytes + self.granularity, dtype=torch.uint8)
        self.has = -(-first // self.granularity) * self.granularity

    def extend(self, nbytes: int) -> None:
        assert nbytes % self.granularity == 0
        assert nbytes < len(self.all), "more than there are addresses for"
        self.has = max(self.has, nbytes)


def made(rows: int, *shapes: tuple[int, ...]) -> tuple[GrowingMemory, list[CountedRange]]:
    ranges: list[CountedRange] = []

    def reserve(nbytes: int, first: int, device: torch.device) -> CountedRange:
        ranges.append(CountedRange(nbytes, first, device))
        return ranges[-1]

    memory = GrowingMemory(HOST, rows, reserve)
    for shape in shapes:
        assert memory.zeros(shape, torch.int16).shape == shape
    return memory, ranges


@given(
    widths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    most=st.integers(1, 300),
    nbytes=st.integers(0, 200_000),
)
def test_as_many_rows_as_the_memory_holds(widths: list[int], most: int, nbytes: int) -> None:
    memory, ranges = made(1, *((most, width) for width in widths))
    rows = memory.rows_in(nbytes)
    assert 0 <= rows <= most
    assert memory.nbytes(rows) <= nbytes or rows == 0
    assert rows == most or memory.nbytes(rows + 1) > nbytes
    memory.grow(rows)
    assert sum(each.has for each in ranges) == memory.nbytes(max(rows, 1))
    assert memory.row_bytes == 2 * sum(widths)


def test_rows_are_zero_when_they_get_memory_and_stay_what_they_are() -> None:
    memory = GrowingMemory(HOST, 3, CountedRange)
    tensor = memory.zeros((10, 4), torch.int16)
    address = tensor.data_ptr()
    assert tensor[:3].eq(0).all() and tensor[3:].ne(0).all()
    tensor[1] = 7
    memory.grow(8)
    assert tensor[1].eq(7).all() and tensor[2:8].eq(0).all() and tensor[8:].ne(0).all()
    assert (memory.rows, tensor.data_ptr()) == (8, address)
    memory.grow(2)
    assert memory.rows == 8, "memory is not given back"


def test_the_host_has_memory_for_all() -> None:
    memory = GrowingMemory(HOST, 2)
    tensor = memory.zeros((5, 2), torch.bfloat16)
    memory.grow(5)
    assert tensor.eq(0).all()


@pytest.mark.parametrize("rows", [0, 1])
def test_nothing_has_no_rows(rows: int) -> None:
    assert made(rows)[0].rows_in(1000) == 0
