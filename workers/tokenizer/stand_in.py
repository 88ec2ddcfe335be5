"""A tokenizer for a model that has none: random weights need text of some kind, too.

Text is encoded byte by byte; ids beyond the 256 bytes and the end token have a text each too, a
space and the id, so that every token that is sampled is one to be sent.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from .errors import TextModelError
from .source import TextSource

END_TOKEN, END_ID = "<|endoftext|>", 256
_SPACE = "\u0120"
"""As byte-level vocabularies write it."""


def stand_in_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level, of so many tokens.  Raises TextModelError for fewer than 257."""
    if vocab_size <= END_ID:
        raise TextModelError(
            f"a vocabulary of {vocab_size} tokens has no room for 256 bytes and an end token: pass "
            "--tokenizer DIR"
        )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = (f"{_SPACE}{index}" for index in range(END_ID + 1, vocab_size))
    vocab = {text: index for index, text in enumerate((*alphabet, END_TOKEN, *words))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_TOKEN])
    return tokenizer


def stand_in_text(vocab_size: int) -> TextSource:
    """The same as a model's text side, without a chat template.  Raises TextModelError."""
    return TextSource(stand_in_tokenizer(vocab_size), vocab_size, {"eos_token": END_TOKEN})
