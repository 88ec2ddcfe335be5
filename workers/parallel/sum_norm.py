"""All-reduce, addition to the residual stream and RMSNorm as one kernel, some rows a program.

What a row-parallel layer leaves on each rank is summed, added and normalised
without going through memory between.  Every rank writes its rows to all ranks'
memory and then reads its own, so that nobody waits for a read over the link.
Two ways to know that all is there, of which the caller chooses by size:

    parcels   as they are; then the ranks meet (one_shot.py)
    letters   each value with the number of the collective beside it: a reader waits until
              all it reads are of this collective

Letters spare the meeting, for four times the bytes of bfloat16: they are for few
rows.  An 8-byte word arrives whole, so a value and its number do (NCCL's "LL"
protocol).  Parcels and letters have memory of their own, and the even and the
odd collectives.  A place is written again two collectives later, by ranks that
have had this rank's data of the collective between, or met it, which came when it
had done with this one: that takes at least one row in each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..kernels.cuda.norm import finish_row
from ..kernels.cuda.overlap import come_up, wait
from .one_shot import meet


@triton.jit
def _send(value, epoch, letters, offset, here, SIZE: tl.constexpr):
    """float32 values to the same place in all ranks' memory, with the number of the collective."""
    bits = value.to(tl.uint32, bitcast=True).to(tl.uint64)
    letter = (epoch.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | bits
    for peer in tl.static_range(SIZE):
        theirs = tl.load(letters + peer).to(tl.pointer_type(tl.uint64))
        tl.store(tl.multiple_of(theirs + offset, 16), letter, mask=here, cache_modifier=".wt")


@triton.jit
def _receive(epoch, mine, offset, here):
    """float32 values, once all have come."""
    place = tl.multiple_of(mine + offset, 16)
    number = epoch.to(tl.uint32, bitcast=True).to(tl.uint64)
    letter = tl.load(place, mask=here, other=0, volatile=True)
    while tl.max((here & ((letter >> 32) != number)).to(tl.int32), 0) != 0:
        letter = tl.load(place, mask=here, other=0, volatile=True)
    return letter.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rank", "rows"])
def sum_norm(
    x, residual, inner, weight, out, inboxes, flags, epochs,
    rows, room, rank, eps,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, INNER: tl.constexpr,
    LETTERS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out = norm(residual += sum of the ranks' x [rows, WIDTH]), as kernels/cuda/norm.py does it.

    The sum is made in float32 in the order of the ranks and rounded to x's dtype
    before it is used.  inboxes: int64 [SIZE], addresses of every rank's [2, SIZE, room],
    by parity of the collective and sender: uint64 where LETTERS, else of x's dtype.
    flags, epochs: see one_shot.py.  PADDED: WIDTH, up to a power of two.  Grid (PROGRAMS,).
    """
    come_up(OVERLAP)
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, PADDED)
    here = column < WIDTH
    factor = tl.load(weight + column, mask=here, other=0.0).to(tl.float32)
    wait(OVERLAP)
    epoch = tl.load(epochs + program) + 1
    first = (epoch & 1).to(tl.int64) * SIZE
    element = x.dtype.element_ty
    for row in range(program, rows, programs):
        at = row * WIDTH + column
        place = (first + rank) * room + at
        value = tl.load(x + at, mask=here, other=0.0)
        if LETTERS:
            _send(value.to(tl.float32), epoch, inboxes, place, here, SIZE)
        else:
            for peer in tl.static_range(SIZE):
                theirs = tl.load(inboxes + peer).to(tl.pointer_type(element))
                tl.store(tl.multiple_of(theirs + place, 16), value, mask=here)
    if not LETTERS:
        meet(flags, rank, program, epoch, SIZE)
    for row in range(program, rows, programs):
        at = row * WIDTH + column
        total = tl.zeros([PADDED], tl.float32)
        for peer in tl.static_range(SIZE):
            place = (first + peer) * room + at
            if LETTERS:
                mine = tl.load(inboxes + rank).to(tl.pointer_type(tl.uint64))
                total += _receive(epoch, mine, place, here)
            else:
                mine = tl.load(inboxes + rank).to(tl.pointer_type(element))
                brought = tl.load(
                    tl.multiple_of(mine + place, 16), mask=here, other=0.0, cache_modifier=".cg"
                )
                total += brought.to(tl.float32)
        start = row * WIDTH
        finish_row(
            total.to(element).to(tl.float32), residual + start, inner, factor, out + start, column,
            eps, WIDTH, INNER, True,
        )  # fmt: skip
    tl.store(epochs + program, epoch)
