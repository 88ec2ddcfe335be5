"""Grammar masks on the GPU: what a mask does not have becomes -inf, after all other edits.

The masks come from the host while the forward pass runs (engine/cuda/grammar_rows.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE = 4096


class MaskTables:
    """masks: [max_rows, words] int32, bit t of a mask for token t of the whole vocabulary.

    mask_of_row: [max_rows] int32, the mask of each sampling row, -1 where it has none.
    """

    def __init__(
        self, max_rows: int, vocab_size: int, first_id: int, device: torch.device | str
    ) -> None:
        """A rank whose shard begins at token first_id."""
        self.first_id = first_id
        self.words = triton.cdiv(vocab_size, 32)
        self.masks = torch.zeros((max_rows, self.words), dtype=torch.int32, device=device)
        self.mask_of_row = torch.full((max_rows,), -1, dtype=torch.int32, device=device)


@triton.jit
def mask_rows(
    logits, mask_of_row, masks, row_stride, first_id, width, words, TILE: tl.constexpr
):  # fmt: skip
    """Program (r, t): tile t of row r.  NaN and +inf stay: the sampler is to see them."""
    row = tl.program_id(0)
    which = tl.load(mask_of_row + row)
    if which >= 0:
        local = tl.program_id(1) * TILE + tl.arange(0, TILE)
        there = local < width
        token = first_id + local
        word = tl.load(masks + which * words + token // 32, mask=there, other=-1)
        banned = there & (((word >> (token % 32)) & 1) == 0)
        at = logits + row.to(tl.int64) * row_stride + local
        z = tl.load(at, mask=banned, other=0.0).to(tl.float32)
        tl.store(at, -float("inf"), mask=banned & (z < float("inf")))


def mask(logits: torch.Tensor, tables: MaskTables) -> None:
    """Masks logits [B, width] of the shard, rows contiguous, in place."""
    rows, width = logits.shape
    if rows:
        mask_rows[(rows, triton.cdiv(width, _TILE))](
            logits, tables.mask_of_row, tables.masks, logits.stride(0), tables.first_id, width,
            tables.words, TILE=_TILE, num_warps=4,
        )  # fmt: skip
