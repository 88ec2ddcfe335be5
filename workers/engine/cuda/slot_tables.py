"""What a GPU worker remembers of every slot, and the buffers of a step, all on the device.

The kernels of apply_plan.py, gather.py and edit_state.py are the only writers;
sampling reads the parameters.
The meanings are those of slot_state.py.  One row more than there are slots: the
dummy slot, the last one, stands in for the rows that pad a batch to a
captured size.  It is greedy, stays at position 0, and its block table names the
KV cache's scratch block, so what padding computes is written where nobody reads.

Buffers are made once, at their largest: CUDA graphs remember addresses.
"""

from __future__ import annotations

import torch

from ....ipc.plan import MAX_PLAN_SCORES, plan_bytes
from ...sampling.cuda.edit_tables import EditTables
from ..batch import StepBatch
from .mixed_sizes import MixedSize


class SlotTables:
    """Tables by slot, and the input of a step by row, sequence and sampling row.

    position, last_token, top_k, logprobs: [slots + 1] int32.  temperature, top_p, min_p:
    [slots + 1] float32.  seed: [slots + 1] int64, the bits of a uint64.
    block_tables: [slots + 1, max_blocks] int32.  edits: see EditTables.
    words: the plan, int32, as ipc/plan.py lays it out.
    decode: [max_num_seqs] int32, the plan's decodes and then the dummy slot.
    tokens, positions, kv_index: by row.  query_start, context_len, slots: by
    sequence.  sample_rows, sample_slots, draw_position, sampled: by sampling row,
    sample_rows going on with the rows that are scored.  score_tokens: by these.
    """

    def __init__(
        self,
        slots: int,
        max_num_seqs: int,
        max_blocks: int,
        max_num_batched_tokens: int,
        block_size: int,
        width: int,
        first_id: int,
        device: torch.device,
    ) -> None:
        """width, first_id: this rank's shard of the vocabulary."""
        rows = max_num_batched_tokens + max_num_seqs
        self.max_num_seqs = max_num_seqs
        self.block_size = block_size
        self.dummy_slot = slots

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        def floats(value: float) -> torch.Tensor:
            return torch.full((slots + 1,), value, dtype=torch.float32, device=device)

        self.position = ints(slots + 1)
        self.last_token = ints(slots + 1)
        self.top_k = ints(slots + 1)
        self.logprobs = ints(slots + 1)
        self.temperature = floats(0.0)
        self.top_p = floats(1.0)
        self.min_p = floats(0.0)
        self.seed = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self.seed_words = self.seed.view(torch.int32)
        self.edits = EditTables(slots + 1, width, first_id, max_blocks * block_size, device)
        self.block_tables = ints(slots + 1, max_blocks)

        frame = plan_bytes(
            max_num_seqs, max_num_batched_tokens, block_size, max_blocks * block_size
        )
        self.words = ints(frame // 4)
        self.decode = ints(max_num_seqs)
        self.decode.fill_(self.dummy_slot)
        self.tokens = ints(rows)
        self.positions = ints(rows)
        self.kv_index = ints(rows)
        # Chunks and decodes are padded apart.
        self.query_start = ints(2 * max_num_seqs + 1)
        self.context_len = ints(2 * max_num_seqs)
        self.slots = ints(2 * max_num_seqs)
        self.sample_rows = ints(max_num_seqs + MAX_PLAN_SCORES)
        self.score_tokens = ints(MAX_PLAN_SCORES)
        self.sample_slots = ints(max_num_seqs)
        self.draw_position = ints(max_num_seqs)
        self.sampled = ints(max_num_seqs)

    def pad_into(self, scratch_block: int) -> None:
        """Where padding writes to, in stream order."""
        self.block_tables[self.dummy_slot] = scratch_block

    def batch(self, size: MixedSize) -> StepBatch:
        """The step's input as the model sees it: views of the buffers."""
        sequences = size.chunks + size.decodes
        return StepBatch(
            tokens=self.tokens[: size.rows],
            positions=self.positions[: size.rows],
            kv_index=self.kv_index[: size.rows],
            query_start=self.query_start[: sequences + 1],
            context_len=self.context_len[:sequences],
            slots=self.slots[:sequences],
            block_tables=self.block_tables,
            sample_rows=self.sample_rows[: size.logits],
            num_chunks=size.chunks,
        )
