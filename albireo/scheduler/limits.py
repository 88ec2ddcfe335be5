"""The budgets of a group, and the arithmetic of what can never fit into them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from albireo.ipc.config import SPARE_SLOTS, EngineConfig, blocks_for


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Each as the field of EngineConfig of the same name, but for

    num_spare_slots: beyond max_num_seqs, for those that wait for their last step.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int
    lookahead: int
    prefix_caching: bool = True
    num_swap_blocks: int = 0
    itl_target_ms: float = 0.0
    mixed_step_tokens: int = 0
    num_spare_slots: int = SPARE_SLOTS

    @property
    def num_slots(self) -> int:
        """Sequences that hold a slot, at most."""
        return self.max_num_seqs + self.num_spare_slots

    @classmethod
    def of(cls, engine: EngineConfig) -> Limits:
        given = {field.name for field in fields(cls)} - {"num_spare_slots"}
        return cls(**{name: getattr(engine, name) for name in sorted(given)})

    def why_never(self, prompt_len: int, max_tokens: int) -> str | None:
        """Why a request could not run even alone, with the numbers; None when it can.

        Output of an earlier attempt counts with max_tokens, not with the prompt.
        """
        if prompt_len < 1 or max_tokens < 1:
            return (
                f"a prompt of {prompt_len} tokens and max_tokens {max_tokens}: "
                "both have to be at least 1"
            )
        total = prompt_len + max_tokens
        asked = f"a prompt of {prompt_len} tokens and max_tokens {max_tokens} make {total} tokens"
        if total > self.max_model_len:
            return (
                f"{asked}; the limit is {self.max_model_len}. "
                "Shorten the prompt or lower max_tokens"
            )
        # The last token is never computed, so nothing is stored for it.
        blocks = blocks_for(total - 1, self.block_size)
        if blocks > self.num_blocks:
            return (
                f"{asked}, which need {blocks} KV blocks of {self.block_size} tokens; "
                f"there are {self.num_blocks} in all. Shorten the prompt, lower max_tokens, "
                "or give the node more KV memory"
            )
        return None
