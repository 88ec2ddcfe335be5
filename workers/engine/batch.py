"""The input of one forward pass, as layers and kernels see it.

SlotTable (engine/slots.py) fills it from a plan; the model and the kernels
only read it.  Rows of a sequence lie one after the other, sequences back to
back: first the `num_chunks` prefill chunks, then the decodes with one row
each.

    rows        | chunk 0 . . . . | chunk 1 . . | d | d | d |
    query_start 0                 5             8   9  10  11

A batch that is padded to a captured size (engine/cuda/mixed_sizes.py) has
sequences without rows, context_len 0, behind the chunks and behind the
decodes, and rows of no sequence at its end, whose results nobody reads.

A row at position p of a sequence attends to keys 0..p.  Where a sequence
appears in a batch says nothing about its slot: `slots` does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class StepBatch:
    """T rows of S sequences; R logits are wanted; all tensors int32, on the device.

    Valid until the next step: the tensors are views of the slot table's buffers.

    tokens: [T] token ids.
    positions: [T] position of each row in its sequence.
    kv_index: [T] where the row's key and value go: block * block_size + offset.
    query_start: [S + 1] first row of each sequence, and where the last one's end: T, or less.
    context_len: [S] tokens of the sequence after this step (last position + 1).
    slots: [S] row of `block_tables` that belongs to the sequence.
    block_tables: [slots, max_blocks] block numbers; entry i of a row
        holds positions i * block_size and up. Entries past the context are stale.
    sample_rows: [R] rows whose logits are wanted: in sampling-row order, then
        those of chunks that the plan scores.
    num_chunks: sequences 0 .. num_chunks-1 are prefill chunks, the rest decodes.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    kv_index: torch.Tensor
    query_start: torch.Tensor
    context_len: torch.Tensor
    slots: torch.Tensor
    block_tables: torch.Tensor
    sample_rows: torch.Tensor
    num_chunks: int
