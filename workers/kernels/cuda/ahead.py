"""Weights that the next kernel reads, brought into the L2 cache beside one that mostly waits.

A kernel that waits for other ranks leaves the memory idle.  Programs beside its
own then ask for the first columns of every row of the next linear layer's
weight, so that each tile of that layer begins with what is there already; by
the tile it would be a few that are done early.  Nothing is kept and nothing
waits for it: it changes no result (PTX ISA, "cp.async.bulk.prefetch").
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

_LINE = 128
_MOST_PROGRAMS = 64
"""With the 64 of a collective fewer than an H100 has multiprocessors."""


class Part(NamedTuple):
    """What `programs` fetch: the first part_bytes of each of `rows` rows of row_bytes."""

    programs: int
    rows: int
    row_bytes: int
    part_bytes: int


def part_of(weight: torch.Tensor | None, nbytes: int, threads: int) -> Part:
    """At most nbytes of a weight [n, k], for programs of `threads` threads; none of none."""
    if weight is None:
        return Part(0, 0, 0, 0)
    rows, row_bytes = len(weight), weight.stride(0) * weight.element_size()
    part_bytes = min(row_bytes, nbytes // rows) // _LINE * _LINE
    if not part_bytes:
        return Part(0, 0, 0, 0)
    return Part(min(triton.cdiv(rows, threads), _MOST_PROGRAMS), rows, row_bytes, part_bytes)


@triton.jit
def fetch(address, part_bytes):
    """part_bytes, a multiple of 16, from each int64 address on."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [address, tl.zeros(address.shape, tl.int32) + part_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def fetch_ahead(weight, rows, row_bytes, part_bytes, program, programs, THREADS: tl.constexpr):
    """Program `program` of `programs` fetches its share of a Part, a row a thread at a time."""
    each = tl.arange(0, THREADS)
    for first in range(program * THREADS, rows, programs * THREADS):
        row = tl.minimum(first + each, rows - 1).to(tl.int64)
        fetch(weight.to(tl.int64) + row * row_bytes, part_bytes)
