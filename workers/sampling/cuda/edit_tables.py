"""What the GPU remembers of every slot to edit its logits: penalties, counts, bans, masks.

Written by the plan and by sampled tokens (engine/cuda/edit_state.py), read by
the kernels of edits.py.  By slot, the dummy slot included, which asks for nothing.
Tables over the vocabulary hold this rank's shard alone, bit masks 32 tokens a word.

All of it is there from the start, at a size that no request exceeds.  Most of
it are the counts, four bytes a token as the logits of a step: whole words, as
atomic additions need them.  A slot's list of seen tokens names those whose
count is not zero, each once, so penalties read, and a take resets, no others:
whoever finds a zero where it adds is the one that lists the token.
"""

from __future__ import annotations

import torch
import triton

from ....ipc.plan import MAX_BAD_WORD_TOKENS, MAX_PLAN_EDITS

NEWEST = MAX_BAD_WORD_TOKENS
"""Output tokens of a slot that bad words can look at; a power of two."""

IN_PROMPT = 1 << 30
"""Of a count: the token is in the prompt.  Below it: how often it is in the output."""

_SURPLUS = 16
"""Tokens beyond the longest sequence that steps planned ahead may count."""

KIND_SHIFT = 28
"""A row of `rows` is (kind << KIND_SHIFT | token, value); see ipc/plan.py for both."""


class EditTables:
    """flags, until, prompt_len: [slots] int32, as a take gives them (ipc/plan.py).

    repetition, presence, frequency: [slots] float32.
    counts: [slots, width] int32, how often a token is in the output, and IN_PROMPT.
    seen: [slots, room] int32, the tokens with a count, counted from first_id, in any
    order; num_seen: [slots] int32.
    allowed: [slots, mask_words] int32, bits.
    rows: [slots, MAX_PLAN_EDITS, 2] int32, edits but those of EDIT_ALLOW, in
    their order; row_count: [slots] int32.
    newest: [slots, NEWEST] int32, the output token of position p at p % NEWEST.
    """

    def __init__(
        self, slots: int, width: int, first_id: int, max_len: int, device: torch.device | str
    ) -> None:
        """A rank with the tokens first_id .. first_id + width - 1; sequences of up to max_len."""
        self.width = width
        self.room = min(width, max_len + _SURPLUS)
        self.first_id = first_id
        self.mask_words = triton.cdiv(width, 32)

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        def floats(value: float) -> torch.Tensor:
            return torch.full((slots,), value, dtype=torch.float32, device=device)

        self.flags = ints(slots)
        self.until = ints(slots)
        self.prompt_len = ints(slots)
        self.repetition = floats(1.0)
        self.presence = floats(0.0)
        self.frequency = floats(0.0)
        self.counts = ints(slots, width)
        self.seen = ints(slots, self.room)
        self.num_seen = ints(slots)
        self.allowed = ints(slots, self.mask_words)
        self.rows = ints(slots, MAX_PLAN_EDITS, 2)
        self.row_count = ints(slots)
        self.newest = ints(slots, NEWEST)
