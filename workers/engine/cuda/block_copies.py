"""KV blocks that a plan moves: within the cache, and to and from host memory.

A host block holds one KV block of all layers, keys and values, in memory that
is pinned and that kernels read and write where it is.  No target of a plan's
copies is a source of another, so their order does not matter.  Copies to the
host leave the step's way: they run in a stream of their own, beside the forward
pass, on few multiprocessors, and the step has ended when they have.  A preempted
slot keeps its blocks until then, so nothing writes what they read.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ....ipc.plan import COPY_IN, COPY_OUT, COPY_WORDS, PlanView
from ...kernels.interface import KVLayer
from .pinned import pinned_words

_BLOCK = 2048
_PROGRAMS = 1024
_SIDE_PROGRAMS = 16
"""What the link to the host needs to be busy; the rest is left to the forward pass."""

_MEASURED_BLOCKS = 64
_MEASURED_ROUNDS = 5

_COPY = tl.constexpr(COPY_WORDS)
_OUT = tl.constexpr(COPY_OUT)
_IN = tl.constexpr(COPY_IN)


@triton.jit(do_not_specialize=["copies_at", "count"])
def _copy_blocks(
    words, copies_at, count, tensors, host, n_tensors, block_words,
    OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The copies to the host, or all others, as OUT says; any number of programs share them.

    tensors: [n_tensors] int64, addresses of KV tensors.  host: [host blocks, n_tensors,
    block_words] int32.
    """
    size = block_words.to(tl.int64) * 4
    for piece in range(tl.program_id(0), count * n_tensors, tl.num_programs(0)):
        copy = words + copies_at + (piece // n_tensors) * _COPY
        which = piece % n_tensors
        kind = tl.load(copy)
        if (kind == _OUT) == OUT:
            # Addresses as numbers: what is known of them is then known of either.
            cache = tl.load(tensors + which)
            outside = host.to(tl.int64)
            source = tl.load(copy + 1).to(tl.int64)
            target = tl.load(copy + 2).to(tl.int64)
            read = cache + source * size
            write = cache + target * size
            if OUT:
                write = outside + (target * n_tensors + which) * size
            else:
                read = tl.where(kind == _IN, outside + (source * n_tensors + which) * size, read)
            read = tl.multiple_of(read.to(tl.pointer_type(tl.int32)), 16)
            write = tl.multiple_of(write.to(tl.pointer_type(tl.int32)), 16)
            for first in range(0, block_words, BLOCK):
                i = first + tl.arange(0, BLOCK)
                there = i < block_words
                tl.store(write + i, tl.load(read + i, mask=there, other=0), mask=there)


class BlockCopies:
    """The copies of this rank's share of the cache; host_blocks: blocks of host memory.

    The current stream is the engine's.
    """

    def __init__(self, kv: Sequence[KVLayer], host_blocks: int) -> None:
        both = (each for layer in kv for each in (layer.keys, layer.values))
        tensors = list({each.data_ptr(): each for each in both}.values())  # Or one that is both.
        if any(not each.is_contiguous() for each in tensors):
            raise ValueError("KV blocks must be contiguous to be copied")
        first = tensors[0]
        nbytes = first[0].numel() * first.element_size()
        if nbytes % 16:
            raise ValueError(f"a KV block of {nbytes} bytes is no multiple of 16")
        self._host_blocks = host_blocks
        self._kv = kv  # Their addresses are kept below.
        self._block_words = nbytes // 4
        self._tensors = torch.tensor([each.data_ptr() for each in tensors], dtype=torch.int64).to(
            first.device
        )
        words = host_blocks * len(tensors) * self._block_words
        self._host = pinned_words(words) if words else self._tensors.view(torch.int32)
        self._main = torch.cuda.current_stream()
        self._side = torch.cuda.Stream()
        self._planned = torch.cuda.Event()
        self._copied = torch.cuda.Event()

    def measure_ns(self, num_blocks: int) -> int:
        """What a copy to host memory, or back, takes for one block; 0 = there is no host memory.

        Before the first plan: the first blocks are overwritten, of the `num_blocks` there are.
        """
        count = min(_MEASURED_BLOCKS, self._host_blocks, num_blocks)
        if not count:
            return 0
        blocks = torch.arange(count, dtype=torch.int32)
        there, back = (
            torch.stack([torch.full_like(blocks, kind), blocks, blocks], dim=1).cuda()
            for kind in (COPY_OUT, COPY_IN)
        )
        taken: list[float] = []
        for _ in range(_MEASURED_ROUNDS):
            begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record(self._main)
            self._copy(there, 0, count, _SIDE_PROGRAMS, out=True)
            self._copy(back, 0, count, _PROGRAMS, out=False)
            done.record(self._main)
            done.synchronize()
            taken.append(begun.elapsed_time(done) * 1e6)
        return round(statistics.median(taken) / (2 * count))

    def begin(self, plan: PlanView, words: torch.Tensor) -> bool:
        """Launches the plan's copies; words: the plan on the device, int32.

        What the step reads is there for all that the engine's stream does from
        now on.  Returns whether end() has to be called before the step's end.
        """
        is_out = plan.copy[:, 0] == COPY_OUT
        if not is_out.all():
            self._launch(plan, words, _PROGRAMS, out=False)
        if not is_out.any():
            return False
        self._planned.record(self._main)
        self._side.wait_event(self._planned)
        with torch.cuda.stream(self._side):
            self._launch(plan, words, _SIDE_PROGRAMS, out=True)
        self._copied.record(self._side)
        return True

    def end(self) -> None:
        """What the engine's stream does from now on comes after the copies to the host."""
        self._main.wait_event(self._copied)

    def _launch(self, plan: PlanView, words: torch.Tensor, programs: int, out: bool) -> None:
        self._copy(words, plan.words.size - plan.copy.size, len(plan.copy), programs, out)

    def _copy(
        self, words: torch.Tensor, copies_at: int, count: int, programs: int, out: bool
    ) -> None:
        n_tensors = len(self._tensors)
        _copy_blocks[(min(programs, count * n_tensors),)](
            words, copies_at, count, self._tensors, self._host,
            n_tensors, self._block_words, OUT=out, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
