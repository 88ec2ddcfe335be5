"""The sampler of a GPU rank: logits of its vocabulary shard to tokens, without a host in between.

The engine calls sample() once a step, in a stream or while a graph is captured;
nothing in it waits, allocates or looks at data.  On one rank nothing moves.  Several
have the three ways of sampling/sampler.py to the same tokens:

    gather     every rank gets all logits, and samples all rows (moving.py)
    sequence   every rank gets rows r, r + size, ... whole and samples those (moving.py)
    vocab      every rank reduces its shard, and candidates are exchanged (shards.py);
               rows they do not decide go the way of `sequence` in the same graph

Where ranks cannot write to each other's memory, whole rows have one way: all ranks get, and
sample, all of them (gathered.py).

`auto` takes the fastest for a kind and a number of rows by a table that rank 0 measures
(tune), and that all ranks have: so all capture, and replay, the same.  The tokens are
those of the CPU sampler for the same logits (see arithmetic.py), whatever the way.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch

from ...parallel.communicator import DeviceCommunicator, SingleRank
from .gathered import GatheredRows
from .moving import WholeRows
from .row_kernels import RowKernels, Rows, SlotParameters
from .shards import ShardSampler

GATHER, SEQUENCE, VOCAB = MODES = ("gather", "sequence", "vocab")
AUTO = "auto"

_TUNED_ROWS = (1, 8, 32, 128)
_KINDS = ((False, False), (True, False), (True, True))
"""(full, filtered): greedy, plain, filtered."""


class CudaSampler:
    """Samples up to max_rows rows a step, together with the group's other ranks.

    vocab_size: of all ranks together; first_id: this rank's first token,
    rank * vocab_size / size.  mode: one of MODES, or AUTO, which is `vocab` until
    tune() has measured.  All scratch is made here.
    """

    def __init__(
        self,
        max_rows: int,
        vocab_size: int,
        first_id: int,
        communicator: DeviceCommunicator | None = None,
        device: torch.device | str = "cuda",
        mode: str = AUTO,
    ) -> None:
        self._communicator: DeviceCommunicator = communicator or SingleRank()
        rank, size = self._communicator.rank, self._communicator.size
        width, remainder = divmod(vocab_size, size)
        if remainder or first_id != rank * width:
            raise ValueError(
                f"rank {rank} of {size} cannot have the shard from token {first_id} of "
                f"{vocab_size}: shards are {vocab_size}/{size} tokens each"
            )
        if mode not in (*MODES, AUTO):
            raise ValueError(
                f"there is no sampling mode {mode!r}: choose one of {', '.join((*MODES, AUTO))}"
            )
        device = torch.device(device)
        self._device = device
        self._max_rows = max_rows
        self._width = width
        self._mode = mode
        self._table: dict[tuple[bool, bool, int], str] = {}
        if size == 1:
            self._alone = RowKernels(max_rows, width, 1, first_id, device)
            self._alone.add_filters(max_rows, device)
        else:
            whole = WholeRows if self._communicator.has_peer_memory else GatheredRows
            self._whole = whole(max_rows, width, self._communicator, device)
            if mode in (VOCAB, AUTO):
                self._shards = ShardSampler(max_rows, width, first_id, self._communicator, device)

    @property
    def undecided(self) -> int:
        """Rows that the candidates of `vocab` have left to `sequence` so far; waits for the GPU."""
        return 0 if self._communicator.size == 1 else int(self._whole.undecided.item())

    def mode_for(self, rows: int, full: bool, filtered: bool) -> str:
        """How so many rows of a kind are sampled, the same on all ranks; see sample()."""
        if self._mode != AUTO:
            return self._mode
        sizes = [tuned for tuned in _TUNED_ROWS if (False, False, tuned) in self._table]
        if not sizes:
            return VOCAB
        size = min(sizes, key=lambda tuned: abs(tuned.bit_length() - rows.bit_length()))
        return self._table[(full, full and filtered, size)]

    def tune(self, time_us: Callable[[Callable[[], None]], float]) -> dict[str, dict[str, float]]:
        """Measures the modes for AUTO with made-up logits; all ranks call it, before any graph.

        time_us: the time of a call.  Rank 0's decide on every rank, and are returned: microseconds
        by case and mode; empty where there is nothing to choose.
        """
        if self._communicator.size == 1 or self._mode != AUTO:
            return {}
        counts = [count for count in _TUNED_ROWS if count <= self._max_rows] or [self._max_rows]
        cases = [(*kind, count) for kind in _KINDS for count in counts]
        mine = [self._time_us(*case, mode, time_us) for case in cases for mode in MODES]
        nanoseconds = torch.tensor([round(us * 1e3) for us in mine], dtype=torch.int32)
        times = torch.zeros(
            self._communicator.size, len(mine), dtype=torch.int32, device=self._device
        )
        self._communicator.all_gather(nanoseconds.to(self._device), times)
        first = times[0].view(len(cases), len(MODES)).tolist()
        self._table = {
            case: MODES[row.index(min(row))] for case, row in zip(cases, first, strict=True)
        }
        self._whole.undecided.zero_()
        return {
            f"{('greedy', 'plain', 'filtered')[full + filtered]}, {count} rows": {
                mode: ns / 1e3 for mode, ns in zip(MODES, row, strict=True)
            }
            for (full, filtered, count), row in zip(cases, first, strict=True)
        }

    def _time_us(
        self,
        full: bool,
        filtered: bool,
        count: int,
        mode: str,
        time_us: Callable[[Callable[[], None]], float],
    ) -> float:
        device = self._device
        generator = torch.Generator(device).manual_seed(1 + self._communicator.rank)
        logits = torch.randn(count, self._width, generator=generator, device=device) * 2.5
        numbers = torch.arange(count, dtype=torch.int32, device=device)
        tables = SimpleNamespace(
            temperature=torch.full((count,), 0.8 * full, device=device),
            top_k=numbers * 0 + 50 * filtered,
            top_p=torch.full((count,), 0.95 if filtered else 1.0, device=device),
            min_p=torch.full((count,), 0.02 * filtered, device=device),
            seed=torch.arange(count, device=device),
        )
        rows = Rows(logits, count, (self._width, 0), numbers, numbers, tables)
        out = torch.zeros(count, dtype=torch.int32, device=device)
        return time_us(lambda: self._sample_by(mode, rows, out, full, filtered))

    def sample(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        tables: SlotParameters,
        draw_position: torch.Tensor,
        full: bool,
        out: torch.Tensor,
        filtered: bool = True,
    ) -> None:
        """out[i] (int32) = the token of row i, or -1 where its logits are not finite.

        logits: [B, V / size] float32 or bfloat16, rows contiguous.  slots,
        draw_position, out: int32 [B], contiguous.  full: not every row is
        greedy.  filtered: of the others, some have top-k, top-p or min-p.
        """
        count = logits.shape[0]
        if count == 0:
            return
        self._check(logits, slots, draw_position, out)
        rows = Rows(logits, count, (logits.stride(0), 0), slots, draw_position, tables)
        if self._communicator.size == 1:
            self._alone.sample(rows, out, full, filtered)
        else:
            self._sample_by(self.mode_for(count, full, filtered), rows, out, full, filtered)

    def _sample_by(
        self, mode: str, rows: Rows, out: torch.Tensor, full: bool, filtered: bool
    ) -> None:
        if mode == GATHER:
            self._whole.sample_all(rows, out, full, filtered)
        elif mode == SEQUENCE:
            self._whole.sample_shares(rows, out, full, filtered)
        else:
            self._shards.sample(rows, out, full, filtered)
            if full and filtered:
                self._whole.sample_undecided(rows, out)

    def _check(
        self,
        logits: torch.Tensor,
        slots: torch.Tensor,
        draw_position: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        rows, width = logits.shape
        if rows > self._max_rows or width != self._width or logits.stride(1) != 1:
            raise ValueError(
                f"logits [{rows}, {width}] of strides {logits.stride()} do not fit a sampler of "
                f"{self._max_rows} rows of {self._width} contiguous tokens"
            )
        for name, x in (("slots", slots), ("draw_position", draw_position), ("out", out)):
            if x.dtype is not torch.int32 or x.shape != (rows,) or not x.is_contiguous():
                raise ValueError(
                    f"{name} must be contiguous int32 [{rows}], not {x.dtype} {tuple(x.shape)}"
                )
