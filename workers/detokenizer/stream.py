"""The tokens of one answer to text, as they come.

A stream gives out whole characters only; joined, its pieces and the last
flush are the text of decoding all tokens at once.  ByteLevelStream serves
byte-level tokenizers (Llama 3, Qwen, SmolLM, Mistral's newer ones) by looking
tokens up in tables; WindowStream serves all others by decoding the last few
tokens again with each new one.  request.py is the only user.

For WindowStream the promise holds as far as the decoder lets a text's
beginning alone.  The one decoder of our families that does not is byte
fallback: it turns a whole run of byte tokens into U+FFFD when any of it is not
UTF-8, even characters that were complete, and have been shown, by then.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Protocol

from albireo.workers.tokenizer.text_model import TextModel

_REPLACEMENT = "�"
_MAX_CHARACTER_BYTES = 4
_new_decoder = codecs.getincrementaldecoder("utf-8")


class TextStream(Protocol):
    """What request.py needs of a stream."""

    def add(self, token: int) -> str:
        """The text that has become certain with `token`; often empty or one word."""
        ...

    def flush(self) -> str:
        """What was held back, at the answer's end: an incomplete character is U+FFFD."""
        ...


def stream_factory(text: TextModel, vocab_size: int) -> Callable[[bool], TextStream]:
    """Streams for a model's tokenizer; the argument is `skip_special_tokens`.

    vocab_size: rows of the model's embedding.  Rows beyond the tokenizer's
    vocabulary are padding and have no text.
    """
    if text.token_bytes is None:
        return lambda skip_special_tokens: WindowStream(text, skip_special_tokens)
    size = max(vocab_size, text.vocab_size)
    tables = {skip: ByteTables(text.token_bytes, size) for skip in (False, True)}
    for token in text.special_ids:
        tables[True].hide(token)
    return lambda skip_special_tokens: ByteLevelStream(tables[skip_special_tokens])


class ByteTables:
    """Bytes of every token, and their text where they are whole characters (else None)."""

    __slots__ = ("pieces", "texts")

    def __init__(self, token_bytes: list[bytes], size: int) -> None:
        self.pieces = token_bytes + [b""] * (size - len(token_bytes))
        self.texts = [_whole_text(piece) for piece in self.pieces]

    def hide(self, token: int) -> None:
        """Takes a token's text away."""
        self.pieces[token] = b""
        self.texts[token] = ""


class ByteLevelStream:
    """Bytes put together to characters."""

    __slots__ = ("_pending", "_pieces", "_texts")

    def __init__(self, tables: ByteTables) -> None:
        self._texts = tables.texts
        self._pieces = tables.pieces
        self._pending: codecs.IncrementalDecoder | None = None

    def add(self, token: int) -> str:
        if self._pending is None:
            text = self._texts[token]
            if text is not None:
                return text
            self._pending = _new_decoder("replace")
        text = self._pending.decode(self._pieces[token])
        if not self._pending.getstate()[0]:
            self._pending = None
        return text

    def flush(self) -> str:
        if self._pending is None:
            return ""
        return self._pending.decode(b"", True)


class WindowStream:
    """The last tokens decoded again with every new one.

        ids   ... | shown, but needed as context | not shown yet |
                  ^ 0                            ^ _shown        ^ len(_ids)

    What decoding the window yields beyond the context's own text is new.  It is
    held back while it ends in U+FFFD, which a further byte may complete, but
    for no more tokens than a character has bytes: then it is not UTF-8.

    Ids that the decoder passes over never enter the window.
    """

    __slots__ = ("_decode", "_has_token", "_hidden", "_ids", "_shown", "_skip")

    def __init__(self, text: TextModel, skip_special_tokens: bool) -> None:
        self._decode = text.decode_window
        self._has_token = text.has_token
        self._skip = skip_special_tokens
        self._hidden = text.special_ids if skip_special_tokens else frozenset()
        self._ids: list[int] = []
        self._shown = 0

    def add(self, token: int) -> str:
        if token in self._hidden or not self._has_token(token):
            return ""
        self._ids.append(token)
        new = self._new_text()
        if not new or (
            new.endswith(_REPLACEMENT) and len(self._ids) - self._shown <= _MAX_CHARACTER_BYTES
        ):
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return new

    def flush(self) -> str:
        return self._new_text()

    def _new_text(self) -> str:
        whole = self._decode(self._ids, self._skip)
        return whole[len(self._decode(self._ids[: self._shown], self._skip)) :]


def _whole_text(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None
