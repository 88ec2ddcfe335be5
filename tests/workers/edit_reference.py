"""What a request may change in its logits, as a plan says it and as plain numpy computes it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from albireo.ipc.plan import (
    EDIT_ALLOW,
    EDIT_BAD_WORD,
    EDIT_BAN_UNTIL,
    EDIT_BIAS,
    TAKE_ALLOWS,
    TAKE_COUNTS,
    TAKE_EDITS,
    TAKE_FLAGS,
    TAKE_FREQUENCY,
    TAKE_PRESENCE,
    TAKE_PROMPT_LEN,
    TAKE_REPETITION,
    TAKE_UNTIL,
)


def float_bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


@dataclass(frozen=True)
class Ask:
    """banned: tokens that are not generated before there are min_tokens of output."""

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    biases: dict[int, float] = field(default_factory=dict)
    allowed: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()
    min_tokens: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()

    def write_take(self, words: list[int], prompt_len: int) -> None:
        """The words of a take that say it."""
        words[TAKE_REPETITION] = float_bits(self.repetition)
        words[TAKE_PRESENCE] = float_bits(self.presence)
        words[TAKE_FREQUENCY] = float_bits(self.frequency)
        words[TAKE_PROMPT_LEN] = prompt_len
        words[TAKE_UNTIL] = prompt_len + self.min_tokens
        penalties = (self.repetition, self.presence, self.frequency) != (1.0, 0.0, 0.0)
        words[TAKE_FLAGS] = (
            TAKE_COUNTS * (penalties or bool(self.bad_words))
            + TAKE_EDITS * bool(self.biases or self.allowed or self.banned or self.bad_words)
            + TAKE_ALLOWS * bool(self.allowed)
        )

    def edit_rows(self, slot: int) -> list[list[int]]:
        rows = [[slot, EDIT_BIAS, token, float_bits(bias)] for token, bias in self.biases.items()]
        rows += [[slot, EDIT_ALLOW, token, 0] for token in self.allowed]
        rows += [[slot, EDIT_BAN_UNTIL, token, 0] for token in self.banned]
        for word in self.bad_words:
            left = range(len(word) - 1, -1, -1)
            rows += [
                [slot, EDIT_BAD_WORD, token, after] for token, after in zip(word, left, strict=True)
            ]
        return rows

    def edited(self, logits: np.ndarray, prompt: list[int], output: list[int]) -> np.ndarray:
        """float32 [V] -> what is sampled after these tokens, float32 [V]."""
        z = np.array(logits, np.float32)
        if self.allowed:
            z[~np.isin(np.arange(len(z)), self.allowed)] = -np.inf
        for token, bias in self.biases.items():
            z[token] += np.float32(bias)
        if len(output) < self.min_tokens:
            z[list(self.banned)] = -np.inf
        for word in self.bad_words:
            before = list(word[:-1])
            if not before or output[-len(before) :] == before:
                z[word[-1]] = -np.inf
        for token in sorted({*prompt, *output}):
            repetition = np.float32(self.repetition)
            z[token] = z[token] / repetition if z[token] > 0 else z[token] * repetition
            count = output.count(token)
            if count:
                z[token] -= np.float32(self.frequency) * np.float32(count)
                z[token] -= np.float32(self.presence)
        return z


def random_ask(choose: random.Random, vocab_size: int) -> Ask:
    """Some of everything; tokens of bad words are few, so that they occur."""

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(choose.sample(range(vocab_size), choose.randrange(1, most)))

    def perhaps(value: float, off: float) -> float:
        return value if choose.random() < 0.5 else off

    return Ask(
        repetition=perhaps(choose.uniform(0.5, 2.0), 1.0),
        presence=perhaps(choose.uniform(-2, 2), 0.0),
        frequency=perhaps(choose.uniform(-2, 2), 0.0),
        biases={t: choose.uniform(-100, 100) for t in tokens(9)} if choose.random() < 0.5 else {},
        allowed=tokens(vocab_size) if choose.random() < 0.3 else (),
        banned=tokens(6) if choose.random() < 0.5 else (),
        min_tokens=choose.randrange(5),
        bad_words=tuple(
            tuple(choose.randrange(4) for _ in range(choose.randrange(1, 4)))
            for _ in range(choose.randrange(4))
        ),
    )
