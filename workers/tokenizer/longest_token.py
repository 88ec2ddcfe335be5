"""How many bytes of text a token stands for at most: so a text's length tells how few it can have.

BPE with a token for every byte cuts a text up and loses nothing of it, and byte-level
BPE that lacks some loses these alone.  Whatever else may swallow characters without
limit: unknown tokens, white space that is dropped beside added tokens or between
words, most normalizers.  What is not known here not to do so counts as if it did.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from .token_bytes import byte_of_character

_ASCII = bytes(range(128))
_COMPOSED_ASCII = b"K`;"
"""All the ASCII that NFC makes of other characters: U+212A, U+1FEF, U+037E."""
_CHARACTER_BYTES = 4
_COMPOSED_BYTES = 4
"""Bytes of a text that NFC makes one of, at most: three or four characters become one."""


def lost_bytes(tokenizer: Tokenizer) -> bytes:
    """Bytes that byte-level BPE has no token for: of a text it leaves them out."""
    model = tokenizer.model
    if not _is_byte_level(tokenizer) or type(model) is not models.BPE or model.unk_token:
        return b""
    names = pre_tokenizers.ByteLevel.alphabet()
    to_byte = byte_of_character()
    return bytes(to_byte.get(ord(n), ord(n)) for n in names if model.token_to_id(n) is None)


def longest_token(tokenizer: Tokenizer) -> int:
    """Most bytes of UTF-8, lost_bytes left out, that one token stands for; 0 = there may be no such
    limit."""
    added = tokenizer.get_added_tokens_decoder().values()
    cuts = _steps(tokenizer.pre_tokenizer, "pretokenizers")
    rules = _steps(tokenizer.normalizer, "normalizers")
    composes = [rule["type"] for rule in rules] == ["NFC"]
    byte_level = _is_byte_level(tokenizer)
    if (
        not _knows_every_byte(tokenizer.model, byte_level)
        or (rules and lost_bytes(tokenizer))
        or not all(map(_keeps_text, cuts))
        or not (composes or all(map(_never_shortens, rules)))
        or any(token.lstrip or token.rstrip for token in added)
    ):
        return 0
    texts = {token.content for token in added}
    if tokenizer.normalizer is not None:
        # Such a token is looked for in normalized text, as it is itself when normalized.
        texts |= {tokenizer.normalizer.normalize_str(t.content) for t in added if t.normalized}
    measure = _most_bytes if composes else len
    longest = max((measure(text.encode()) for text in texts), default=0)
    for token in sorted(tokenizer.get_vocab(False), key=len, reverse=True):
        if len(token) * _CHARACTER_BYTES * _COMPOSED_BYTES <= longest:
            break  # nor is any other of so many
        longest = max(longest, measure(_bytes_of(token, byte_level)))
    return longest


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """Of a normalizer or a pre-tokenizer, sequences laid open."""
    if part is None:
        return []
    found, waiting = [], [json.loads(part.__getstate__())]
    while waiting:
        step = waiting.pop(0)
        if step["type"] == "Sequence":
            waiting[:0] = step[name]
        else:
            found.append(step)
    return found


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    return any(
        cut["type"] == "ByteLevel" for cut in _steps(tokenizer.pre_tokenizer, "pretokenizers")
    )


def _knows_every_byte(model: models.Model, byte_level: bool) -> bool:
    """Whether it makes tokens of any text but for lost_bytes, and no unknown ones."""
    if type(model) is not models.BPE:
        return False
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    if byte_level:
        if not model.unk_token:
            return True
        names = pre_tokenizers.ByteLevel.alphabet()
    elif model.byte_fallback:
        names = [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        return False
    return all(model.token_to_id(name) is not None for name in names)


def _keeps_text(cut: dict[str, Any]) -> bool:
    if cut["type"] in ("Split", "Punctuation"):
        return bool(cut["behavior"] != "Removed")
    return cut["type"] in ("ByteLevel", "Digits", "Metaspace")


def _never_shortens(rule: dict[str, Any]) -> bool:
    if rule["type"] == "Replace":
        pattern = rule["pattern"].get("String")
        return pattern is not None and len(rule["content"].encode()) >= len(pattern.encode())
    return bool(rule["type"] == "Prepend")


def _bytes_of(token: str, byte_level: bool) -> bytes:
    """Of normalized text, as the model has it."""
    if byte_level:
        try:
            return token.translate(byte_of_character()).encode("latin-1")
        except UnicodeEncodeError:
            pass
    return token.encode()


def _most_bytes(text: bytes) -> int:
    """Of all that NFC makes this of, the length of the longest."""
    composed = len(text.translate(None, _ASCII)) + sum(map(text.count, _COMPOSED_ASCII))
    return len(text) + (_COMPOSED_BYTES - 1) * composed
