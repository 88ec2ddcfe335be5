"""A request on a slot, for tests of what a worker keeps of it: what it asks for, its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from albireo.ipc.plan import TAKE_FLAGS, TAKE_SLOT, TAKE_START, TAKE_WORDS

from .edit_reference import Ask


@dataclass
class Asking:
    """tokens: the prompt first."""

    tokens: list[int]
    prompt_len: int
    ask: Ask
    fed: int = 0
    """Tokens in the slot's cache."""
    known: int = 0
    """Tokens that the slot's counts have seen: those that were fed or sampled."""

    @property
    def flags(self) -> int:
        return self.take_words(0, 0)[TAKE_FLAGS]

    def take_words(self, slot: int, start: int) -> list[int]:
        words = [0] * TAKE_WORDS
        words[TAKE_SLOT], words[TAKE_START] = slot, start
        self.ask.write_take(words, self.prompt_len)
        return words

    def edited(self, logits: np.ndarray) -> np.ndarray:
        """Logits [V] float32 of the token after `known`, as the request changes them."""
        known = self.tokens[: self.known]
        return self.ask.edited(logits, known[: self.prompt_len], known[self.prompt_len :])
