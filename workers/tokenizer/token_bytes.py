"""The bytes of tokens.

Byte-level tokenizers write a token as printable characters, one for a byte
(GPT-2's table: most of Latin-1 stands for itself, the rest is moved up to
U+0100 and beyond).  The detokenizer looks bytes up instead of decoding, so the
table follows the library to the letter, its treatment of added tokens included:
a token with a character outside the table stands for its own UTF-8.

SentencePiece's tokens are text, with U+2581 for a space, or one byte: <0xAB>.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import chain

from tokenizers import Tokenizer

_SPACE = "▁"


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> list[bytes] | None:
    """Bytes by token id, b"" for ids without a token; None if it is not byte-level."""
    if not _is_byte_level(tokenizer):
        return None
    table = [b""] * vocab_size
    to_byte = byte_of_character()
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        try:
            table[index] = token.translate(to_byte).encode("latin-1")
        except UnicodeEncodeError:
            table[index] = token.encode()
    return table


def bytes_of_piece(piece: str | None) -> bytes:
    """Of a token as SentencePiece writes it; None has none."""
    if piece is None:
        return b""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            pass
    return piece.replace(_SPACE, " ").encode()


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    decoder = tokenizer.decoder
    if decoder is None:
        return False
    layout = json.loads(decoder.__getstate__())
    while layout["type"] == "Sequence" and len(layout["decoders"]) == 1:
        (layout,) = layout["decoders"]
    return bool(layout["type"] == "ByteLevel")


@cache
def byte_of_character() -> dict[int, int]:
    """GPT-2's table, from code points to bytes.

    Characters that stand for no byte map to something that Latin-1 cannot hold.
    """
    themselves = set(chain(range(0x21, 0x7F), range(0xA1, 0xAD), range(0xAE, 0x100)))
    others = [byte for byte in range(256) if byte not in themselves]
    table = dict.fromkeys(others, 0xFFFD)
    table |= {0x100 + rank: byte for rank, byte in enumerate(others)}
    return table
