"""Small collectives in one kernel: every rank writes to its own memory, meets, reads all others'.

CudaCommunicator (cuda.py) launches them, in graphs too.  Memory that all ranks
have mapped, the same on each ("symmetric"):

    slabs [2, slab_bytes]   what a rank brings, to the even and the odd collectives
    flags [PROGRAMS, size]  int32: the collective at which that rank's program has arrived

One meeting a collective is enough: a slab is written again two collectives
later, by ranks that have met once more, so everybody has done with it.  That
needs all collectives to have the same grid, and all ranks to do the same ones
in the same order.  Program p of a rank meets the programs p of the others; the
count of collectives is in `epochs`, on the device, since a graph's replay
cannot be told it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..kernels.cuda.overlap import come_up, wait

PROGRAMS = 64
"""Of every launch.  They wait for their peers, so all of them must be running at once."""

_MIN_BLOCK, _MAX_BLOCK = 512, 8192


def block_of(length: int) -> int:
    """Values that a program takes at once of `length`."""
    block: int = triton.next_power_of_2(triton.cdiv(length, PROGRAMS))
    return min(max(block, _MIN_BLOCK), _MAX_BLOCK)


@triton.jit
def meet(flags, rank, program, epoch, SIZE: tl.constexpr):
    """Returns once program `program` of every rank has come to `epoch`.

    What they wrote before is then visible here, to all threads.
    """
    tl.debug_barrier()
    for peer in tl.static_range(SIZE):
        theirs = tl.load(flags + peer).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(theirs + program * SIZE + rank, epoch, sem="release", scope="sys")
    mine = tl.load(flags + rank).to(tl.pointer_type(tl.int32)) + program * SIZE
    for peer in tl.static_range(SIZE):
        # Counts wrap round; differences do not.
        behind = tl.atomic_add(mine + peer, 0, sem="acquire", scope="sys") - epoch
        while behind < 0:
            behind = tl.atomic_add(mine + peer, 0, sem="acquire", scope="sys") - epoch
    tl.debug_barrier()


@triton.jit(do_not_specialize=["rank"])
def one_shot(
    x,
    out,
    slabs,
    flags,
    epochs,
    length,
    slab_bytes,
    rank,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    REDUCE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out = the sum over the ranks of x [length], or all their x side by side.

    REDUCE: out [length] may be x; added in float32 in the order of the ranks,
    rounded once.  Else out [SIZE, length].  slabs, flags: int64 [SIZE], the
    addresses of every rank's.  epochs: int32 [PROGRAMS].  Grid (PROGRAMS,).
    """
    come_up(OVERLAP)
    wait(OVERLAP)
    program = tl.program_id(0)
    epoch = tl.load(epochs + program) + 1
    element = x.dtype.element_ty
    offset = (epoch & 1).to(tl.int64) * slab_bytes
    mine = (tl.load(slabs + rank) + offset).to(tl.pointer_type(element))
    start = program * BLOCK
    while start < length:
        at = start + tl.arange(0, BLOCK)
        # Triton cannot know that slabs are aligned: accesses would be an element wide.
        place = tl.multiple_of(mine + at, 16)
        tl.store(place, tl.load(x + at, mask=at < length), mask=at < length)
        start += tl.num_programs(0) * BLOCK
    meet(flags, rank, program, epoch, SIZE)
    start = program * BLOCK
    while start < length:
        at = start + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for peer in tl.static_range(SIZE):
            theirs = (tl.load(slabs + peer) + offset).to(tl.pointer_type(element))
            place = tl.multiple_of(theirs + at, 16)
            brought = tl.load(place, mask=at < length, cache_modifier=".cg")
            if REDUCE:
                total += brought.to(tl.float32)
            else:
                tl.store(out + peer * length + at, brought, mask=at < length)
        if REDUCE:
            tl.store(out + at, total.to(element), mask=at < length)
        start += tl.num_programs(0) * BLOCK
    tl.store(epochs + program, epoch)
