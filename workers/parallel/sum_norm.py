"""All-reduce, addition to the residual stream and RMSNorm as one kernel, a row a program.

What a row-parallel layer leaves on each rank is summed, added and normalised
without going through memory between.  Every rank writes its rows into the other
ranks' inboxes and then reads its own, so that nobody waits for a read over the
link.  An inbox is full of NOTHING, a word that no rank sends, until rows come: who
reads waits until there is nothing of it left, and puts it back.  So there is no
flag, no meeting and no byte too many (as the
"Lamport" all-reduces of TensorRT-LLM do it).  A word is 32 bits, a float32 or two
bfloat16, and arrives whole.

There are two inboxes, for the even and the odd collectives.  Program p has the
rows p, p + NORM_PROGRAMS, ... of every collective, and counts those that it has
rows in; programs without one are not launched.  All rows are of one width, so a
place belongs to one program.  It is written again two collectives of that program
later, by ranks that have had this rank's rows of the one between, which were sent
when this one's were read and NOTHING was put back.

Programs beyond those fetch the next layer's weights meanwhile (ahead.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..kernels.cuda.ahead import fetch_ahead
from ..kernels.cuda.norm import finish_row
from ..kernels.cuda.overlap import come_up, wait

NORM_PROGRAMS = 256
"""At most, besides those that fetch.  Each waits for its like on the other ranks: where not all of
them run at once (rows of 8,192), GPUs start them in the order of their numbers, on every rank."""

NOTHING = -0x7FFF8000
"""As int32: 0x80008000, two bfloat16 of -0.0, and a float32 of less than 1e-40."""

_NOTHING = tl.constexpr(NOTHING)


@triton.jit
def _send(words, inboxes, place, here, rank, SIZE: tl.constexpr):
    """int32 words to the same place in all others' inboxes."""
    for peer in tl.static_range(SIZE):
        if peer != rank:
            theirs = tl.load(inboxes + peer).to(tl.pointer_type(tl.int32))
            tl.store(tl.multiple_of(theirs + place, 16), words, mask=here, cache_modifier=".wt")


@triton.jit
def _receive(inbox, place, here):
    """int32 words, once all have come; NOTHING takes their place."""
    at = tl.multiple_of(inbox + place, 16)
    words = tl.load(at, mask=here, other=0, volatile=True)
    while tl.max((words == _NOTHING).to(tl.int32), 0) != 0:
        words = tl.load(at, mask=here, other=0, volatile=True)
    tl.store(at, tl.full(words.shape, _NOTHING, tl.int32), mask=here)
    return words


@triton.jit
def _brought(x, place, here):
    """int32 words of this rank, as it sends them: 0 for NOTHING, whose values are all but 0."""
    words = tl.load(x + place, mask=here, other=0)
    return tl.where(words == _NOTHING, 0, words)


@triton.jit
def _sum(own, inbox, place, part, here, rank, SIZE: tl.constexpr, PAIRS: tl.constexpr):
    """float32 sums over the ranks in their order; own: this one's words, PAIRS: of two values.

    place: of what rank 0 sent; each next rank's is `part` further.
    """
    low = tl.zeros(own.shape, tl.float32)
    high = tl.zeros(own.shape, tl.float32)
    for peer in tl.static_range(SIZE):
        if peer == rank:
            words = own
        else:
            words = _receive(inbox, place + peer * part, here)
        if PAIRS:
            low += (words << 16).to(tl.float32, bitcast=True)
            high += (words & -65536).to(tl.float32, bitcast=True)
        else:
            low += words.to(tl.float32, bitcast=True)
    if PAIRS:
        total = tl.reshape(tl.join(low, high), [2 * own.shape[0]])
    else:
        total = low
    return total


@triton.jit(do_not_specialize=["rank", "rows", "programs"])
def sum_norm(
    x, residual, inner, weight, out, inboxes, epochs,
    rows, programs, room, rank, eps, ahead, ahead_rows, ahead_row_bytes, ahead_part_bytes,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, INNER: tl.constexpr,
    THREADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out = norm(residual += sum of the ranks' x [rows, WIDTH]), as kernels/cuda/norm.py does it.

    The sum is made in float32 in the order of the ranks and rounded to x's dtype
    before it is used.  inboxes: int64 [SIZE], addresses of every rank's int32
    [2, SIZE, room], by parity of the collective and sender, full of NOTHING.  epochs: int32
    [NORM_PROGRAMS].  programs: those with rows, the least of rows and NORM_PROGRAMS; the grid
    is (programs + any,), those beyond fetch, each with THREADS threads.  PADDED: WIDTH, up to
    a power of two.
    """
    come_up(OVERLAP)
    program = tl.program_id(0)
    if program >= programs:
        if OVERLAP:  # GPUs before Hopper do not have the instruction.
            fetch_ahead(
                ahead, ahead_rows, ahead_row_bytes, ahead_part_bytes,
                program - programs, tl.num_programs(0) - programs, THREADS,
            )  # fmt: skip
        return
    column = tl.arange(0, PADDED)
    here = column < WIDTH
    factor = tl.load(weight + column, mask=here, other=0.0).to(tl.float32)
    element = x.dtype.element_ty
    PAIRS: tl.constexpr = element.primitive_bitwidth == 16
    VALUES: tl.constexpr = 2 if PAIRS else 1
    WORDS: tl.constexpr = WIDTH // VALUES
    word = tl.arange(0, PADDED // VALUES)
    is_word = word < WORDS
    words = x.to(tl.pointer_type(tl.int32))
    wait(OVERLAP)
    epoch = tl.load(epochs + program) + 1
    first = (epoch & 1).to(tl.int64) * SIZE * room
    for row in range(program, rows, programs):
        place = row * WORDS + word
        own = _brought(words, place, is_word)
        _send(own, inboxes, first + rank * room + place, is_word, rank, SIZE)
    # On its way while the others are waited for.
    before = tl.load(residual + program * WIDTH + column, mask=here, other=0.0)
    inbox = tl.load(inboxes + rank).to(tl.pointer_type(tl.int32))
    for row in range(program, rows, programs):
        place = row * WORDS + word
        own = _brought(words, place, is_word)
        total = _sum(own, inbox, first + place, room, is_word, rank, SIZE, PAIRS)
        start = row * WIDTH
        finish_row(
            total.to(element).to(tl.float32), before.to(tl.float32), residual + start, inner,
            factor, out + start, column, eps, WIDTH, INNER, True,
        )  # fmt: skip
        following = row + programs
        more = here & (following < rows)
        before = tl.load(residual + following * WIDTH + column, mask=more, other=0.0)
    tl.store(epochs + program, epoch)
