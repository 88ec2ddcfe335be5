"""Sequences in a paged cache, for the tests of the kernels: batches and float64 references."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from albireo.workers.engine.batch import StepBatch
from albireo.workers.kernels.interface import KVLayer


def ints(values: object) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.asarray(values, dtype=np.int32)))


def poison(kv: KVLayer) -> None:
    """Fills a cache with what must not be read before it is written."""
    for numbers in (kv.keys, kv.values):
        numbers.fill_(255 if numbers.dtype == torch.uint8 else float("nan"))
    if kv.wide is not None:
        poison(kv.wide)


class PagedSequences:
    """Block tables of some sequences: blocks shuffled, slots shuffled, stale entries wild."""

    def __init__(self, lengths: Sequence[int], block_size: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.lengths = lengths
        self.block_size = block_size
        needed = [-(-length // block_size) for length in lengths]
        self.num_blocks = sum(needed) + 3
        blocks = rng.permutation(self.num_blocks).astype(np.int32)
        self.slots = rng.permutation(len(lengths) + 2)[: len(lengths)]
        self.scratch = int(blocks[-1])
        self.tables = np.full((len(lengths) + 2, max(needed) + 1), 2**30, np.int32)
        at = 0
        for slot, count in zip(self.slots, needed, strict=True):
            self.tables[slot, :count] = blocks[at : at + count]
            at += count

    def batch(self, chunks: Sequence[tuple[int, int, int]]) -> StepBatch:
        """Chunks of (sequence, first position, tokens), in row order."""
        positions, index = [], []
        for sequence, start, tokens in chunks:
            p = np.arange(start, start + tokens)
            table = self.tables[self.slots[sequence]]
            positions.append(p)
            index.append(table[p // self.block_size] * self.block_size + p % self.block_size)
        lengths = [tokens for _, _, tokens in chunks]
        rows = np.concatenate(positions)
        return StepBatch(
            tokens=ints(np.zeros(len(rows))),
            positions=ints(rows),
            kv_index=ints(np.concatenate(index)),
            query_start=ints(np.concatenate([[0], np.cumsum(lengths)])),
            context_len=ints([start + tokens for _, start, tokens in chunks]),
            slots=ints([self.slots[sequence] for sequence, _, _ in chunks]),
            block_tables=ints(self.tables),
            sample_rows=ints([0]),
            num_chunks=len(chunks),
        )

    def padded(self, batch: StepBatch, rows: int, chunks: int, decodes: int) -> StepBatch:
        """The batch with so many rows, empty chunks and empty decodes more."""
        count, sequences = batch.num_chunks, len(batch.slots)
        starts, device = batch.query_start, batch.slots.device

        def widened(x: torch.Tensor) -> torch.Tensor:
            nothing = torch.zeros(chunks + decodes, dtype=torch.int32, device=device)
            return torch.cat([x[:count], nothing[:chunks], x[count:], nothing[chunks:]])

        def longer(x: torch.Tensor, value: int) -> torch.Tensor:
            return torch.cat([x, torch.full((rows,), value, dtype=torch.int32, device=device)])

        where = [*range(count), *[count] * chunks, *range(count, sequences + 1)]
        where += [sequences] * decodes
        return StepBatch(
            tokens=longer(batch.tokens, 0),
            positions=longer(batch.positions, 0),
            kv_index=longer(batch.kv_index, self.scratch * self.block_size),
            query_start=starts[torch.tensor(where, device=device)],
            context_len=widened(batch.context_len),
            slots=widened(batch.slots),
            block_tables=batch.block_tables,
            sample_rows=batch.sample_rows,
            num_chunks=count + chunks,
        )

    def everything(self) -> StepBatch:
        """All sequences whole."""
        return self.batch([(s, 0, length) for s, length in enumerate(self.lengths)])


def rotate(x: torch.Tensor, rope: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [T, heads, head_dim] float64."""
    half = x.shape[-1] // 2
    angles = rope[positions.long()].double()[:, None]
    cos, sin = angles[..., :half], angles[..., half:]
    low, high = x[..., :half], x[..., half:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int
) -> torch.Tensor:
    """Causal attention of one whole sequence, float64: [n, heads, d] -> [n, heads, d]."""
    share = q.shape[1] // k.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = k.repeat_interleave(share, 0), v.repeat_interleave(share, 0)
    scores = q @ k.transpose(1, 2) * scale
    row = torch.arange(q.shape[1])
    hidden = row[None] > row[:, None]
    if window:
        hidden |= row[None] <= row[:, None] - window
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1)
