"""The requests of `albireo bench sampling`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from albireo.ipc.plan import (
    HISTORY_WORDS,
    PLAN_HEADER,
    TAKE_COUNTS,
    TAKE_FLAGS,
    TAKE_FREQUENCY,
    TAKE_MIN_P,
    TAKE_PRESENCE,
    TAKE_PROMPT_LEN,
    TAKE_REPETITION,
    TAKE_SEED_LO,
    TAKE_SLOT,
    TAKE_START,
    TAKE_TEMPERATURE,
    TAKE_TOP_K,
    TAKE_TOP_P,
    TAKE_WORDS,
    PlanSections,
    PlanView,
    write_plan,
)

_PROMPT, _OUTPUT = 256, 128
"""Tokens of a request, which its penalties see."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests of one kind; 0, 1 and 0 where top_k, top_p and min_p are off, 0, 0 and 1 where the
    penalties are."""

    name: str
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0

    @property
    def full(self) -> bool:
        return self.temperature > 0

    @property
    def filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def penalized(self) -> bool:
        return (self.presence, self.frequency, self.repetition) != (0.0, 0.0, 1.0)


KINDS = (
    Kind("greedy", temperature=0.0),
    Kind("temperature"),
    Kind("top-k", top_k=50),
    Kind("top-p", top_p=0.95),
    Kind("min-p", min_p=0.02),
    Kind("filters", top_k=50, top_p=0.95, min_p=0.02),
    Kind("full", top_k=50, top_p=0.95, min_p=0.02, presence=0.5, frequency=0.3, repetition=1.1),
    Kind("all leave", top_k=1000, top_p=0.95, min_p=0.02),
)
"""`all leave`: top-k is more than what ranks exchange: in `vocab` every row is left over."""


def one_request(kind: Kind, slot: int, vocab: int) -> PlanView:
    """A plan that gives the slot to a request with a prompt and some output, all random tokens."""
    take = np.zeros((1, TAKE_WORDS), np.int32)
    floats = take.view(np.float32)
    take[0, TAKE_SLOT] = take[0, TAKE_SEED_LO] = slot
    take[0, TAKE_TOP_K] = kind.top_k
    take[0, TAKE_PROMPT_LEN], take[0, TAKE_START] = _PROMPT, _PROMPT + _OUTPUT
    take[0, TAKE_FLAGS] = TAKE_COUNTS * kind.penalized
    for word, value in (
        (TAKE_TEMPERATURE, kind.temperature),
        (TAKE_TOP_P, kind.top_p),
        (TAKE_MIN_P, kind.min_p),
        (TAKE_PRESENCE, kind.presence),
        (TAKE_FREQUENCY, kind.frequency),
        (TAKE_REPETITION, kind.repetition),
    ):
        floats[0, word] = value
    tokens = np.random.default_rng(slot).integers(vocab, size=_PROMPT + _OUTPUT, dtype=np.int32)
    history = np.array([[slot, 0, len(tokens)]], np.int32)
    sections = PlanSections(take=take)
    if kind.penalized:
        sections = PlanSections(take=take, history=history, history_token=tokens)
    words = PLAN_HEADER + TAKE_WORDS + HISTORY_WORDS + len(tokens)
    frame = memoryview(bytearray(words * 4))
    write_plan(frame, 0, 0, sections)
    return PlanView(frame)
