"""Rows that are sampled whole where ranks cannot write to each other's memory.

All of a step's logits are gathered on every rank, which samples all rows: to the same tokens,
so none has to be handed out.  What moving.py does by lists of rows on the device cannot be
done by NCCL, whose sizes the host gives: rows that candidates left undecided are gathered
with all others, whether there are any or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton

from .candidates import UNDECIDED
from .row_kernels import RowKernels, Rows

if TYPE_CHECKING:
    from ...parallel.communicator import DeviceCommunicator


class GatheredRows:
    """In place of moving.WholeRows, of which see the parameters and `undecided`.

    Rows are taken in parts of max_rows / size, so that it needs little more memory.
    """

    def __init__(
        self, max_rows: int, width: int, communicator: DeviceCommunicator, device: torch.device
    ) -> None:
        self._communicator = communicator
        self._width = width
        self._most = triton.cdiv(max_rows, communicator.size)
        self._kernels = RowKernels(self._most, width, communicator.size, 0, device)
        self._kernels.add_filters(self._most, device)
        self._mine = torch.zeros(self._most * width, device=device)
        self._everyones = torch.zeros(communicator.size * self._most * width, device=device)
        self._numbers = torch.arange(max_rows, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(self._most, dtype=torch.int32, device=device)
        self.undecided = torch.zeros(1, dtype=torch.int64, device=device)

    def sample_all(self, rows: Rows, out: torch.Tensor, full: bool, filtered: bool) -> None:
        """Every rank samples every row."""
        for part in self._parts(rows):
            gathered = self._gather(rows, part, self._numbers[part])
            self._kernels.sample(gathered, out[part], full, filtered)

    sample_shares = sample_all

    def sample_undecided(self, rows: Rows, out: torch.Tensor) -> None:
        """The rows that are UNDECIDED in out."""
        for part in self._parts(rows):
            undecided = out[part] == UNDECIDED.value
            which = self._numbers[part].masked_fill(~undecided, -1)
            tokens = self._tokens[: len(which)]
            self._kernels.sample(self._gather(rows, part, which), tokens, True, True)
            torch.where(undecided, tokens, out[part], out=out[part])
            self.undecided += undecided.sum()

    def _parts(self, rows: Rows) -> Iterator[slice]:
        for start in range(0, rows.length, self._most):
            yield slice(start, min(start + self._most, rows.length))

    def _gather(self, rows: Rows, part: slice, which: torch.Tensor) -> Rows:
        """Those rows, whole.  which: see Rows."""
        count, dtype = len(which), rows.logits.dtype
        mine = self._mine.view(dtype)[: count * self._width].view(count, self._width)
        mine.copy_(rows.logits[part])
        everyones = self._everyones.view(dtype)[: self._communicator.size * mine.numel()]
        everyones = everyones.view(-1, count, self._width)
        self._communicator.all_gather(mine, everyones)
        strides = (self._width, count * self._width)
        return rows._replace(logits=everyones, length=count, strides=strides, which=which)
