"""A byte-level model for grammars: every byte is a token, and some longer ones are."""

from __future__ import annotations

from functools import cache

import numpy as np

from albireo.workers.grammar.vocabulary import Vocabulary
from albireo.workers.tokenizer.text_model import TextModel

from ..text.tiny_tokenizers import byte_level, text_model

PADDING = 40


@cache
def text() -> TextModel:
    return text_model(byte_level())


def end_id() -> int:
    end = byte_level().token_to_id("<|end|>")
    assert end is not None
    return end


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary(text(), text().vocab_size + PADDING, [end_id()])


def encode(words: str) -> list[int]:
    return text().encode(words, add_special_tokens=False)


def tokens_of(mask: bytes | np.ndarray) -> set[int]:
    """What a mask allows."""
    words = np.frombuffer(mask, np.uint8) if isinstance(mask, bytes) else mask.view(np.uint8)
    return set(np.flatnonzero(np.unpackbits(words, bitorder="little")).tolist())
