"""The model's tokens as matchers see them: bytes, which of them are special, which end an answer.

Made once in the fork server from the text model, so that the trie over the vocabulary lies in
memory that tokenizer and workers share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from albireo.workers.tokenizer.text_model import TextModel

LIMITS = LLParserLimits(
    max_items_in_row=1000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=50_000,
    max_grammar_size=100_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)
"""Of one matcher: a fuel is spent alike everywhere, so all ranks give up at the same token."""

_SILENT = 0


class Vocabulary:
    """Tokens of a model.

    text: its tokenizer.  size: rows of its embedding; those beyond the tokenizer's have no text
    and no grammar allows them.  end_ids: allowed where a grammar may end; at least one.
    """

    def __init__(self, text: TextModel, size: int, end_ids: Sequence[int]) -> None:
        self.size = size
        text.encode_plain("")  # its tokenizer is made before the fork, not by everybody
        self._tokenizer = LLTokenizer(
            cast("Any", _Tokens(text, size, end_ids)),  # its stub knows two classes only
            n_vocab=size,
            eos_token=list(end_ids),
            slices=LLTokenizer.json_slices(),
        )

    @property
    def mask_words(self) -> int:
        """int32 words of a mask: bit i of word w is token 32 * w + i."""
        return -(-self.size // 32)

    def matcher(self, grammar: str) -> LLMatcher:
        """At the beginning of a text that compile.py has made.

        It never raises: what is wrong is in its get_error().
        """
        return LLMatcher(self._tokenizer, grammar, log_level=_SILENT, limits=LIMITS)


class _Tokens:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, text: TextModel, size: int, end_ids: Sequence[int]) -> None:
        self._text = text
        known = text.token_bytes or [text.bytes_of(each) for each in range(text.vocab_size)]
        self.tokens = known[:size] + [b""] * (size - len(known))
        # An end token that the tokenizer takes for text would end an answer in its middle.
        special = {each for each in text.special_ids if each < size} | set(end_ids)
        self.special_token_ids = sorted(special)
        self.eos_token_id = end_ids[0]
        ids = {piece: token for token, piece in enumerate(self.tokens) if token not in special}
        self._ids = {piece: token for piece, token in ids.items() if piece}
        self._longest_token = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes | str) -> list[int]:
        """How the model would write a text: where a grammar forces one, masks have these tokens.

        They must be exactly its bytes; tokenizers that add or change something give way to
        the longest tokens that match.
        """
        wanted = text.encode() if isinstance(text, str) else bytes(text)
        ids = self._text.encode_plain(wanted.decode("utf-8", "replace"))
        if b"".join([self.tokens[token] for token in ids]) == wanted:
            return ids
        return self._longest(wanted)

    def _longest(self, wanted: bytes) -> list[int]:
        """Greedily from the left; stops at a byte that no token has."""
        found: list[int] = []
        at = 0
        while at < len(wanted):
            pieces = (wanted[at : at + size] for size in range(self._longest_token, 0, -1))
            token = next((self._ids[piece] for piece in pieces if piece in self._ids), None)
            if token is None:
                break
            found.append(token)
            at += len(self.tokens[token])
        return found


def end_ids_of(text: TextModel, eos_token_ids: Iterable[int]) -> list[int]:
    """The model's end tokens that its tokenizer has."""
    return [token for token in dict.fromkeys(eos_token_ids) if token < text.vocab_size]
