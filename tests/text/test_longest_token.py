"""Most bytes of text that a token stands for: never too few, and 0 where text can be swallowed."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from albireo.workers.tokenizer.longest_token import longest_token, lost_bytes
from albireo.workers.tokenizer.text_model import TextModelError

from .tiny_tokenizers import byte_level, sentencepiece, text_model


def changed(tokenizer: Tokenizer, **parts: object) -> Tokenizer:
    """A copy with other parts: normalizer=..., added=..."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    for name, part in parts.items():
        if name == "added":
            copy.add_tokens([part])
        else:
            setattr(copy, name, part)
    return copy


def without_some_bytes() -> Tokenizer:
    """Like SmolLM2's: bytes that it was not trained on have no tokens."""
    layout = json.loads(byte_level().to_str())
    trained = set("".join(left + right for left, right in layout["model"]["merges"]))
    for name in set(pre_tokenizers.ByteLevel.alphabet()) - trained:
        del layout["model"]["vocab"][name]
    return Tokenizer.from_str(json.dumps(layout))


def composing() -> Tokenizer:
    return changed(byte_level(), normalizer=normalizers.NFC())


def test_the_longest_token_is_counted_in_bytes_of_the_text() -> None:
    added = [len(content.encode()) for content in ("<|begin|>", "<|user|>", "é x")]
    learned = byte_level().get_vocab(with_added_tokens=False)
    assert longest_token(byte_level()) == max(*added, *map(len, learned)) > 1
    long = AddedToken("é" * 50, normalized=False)
    assert longest_token(changed(byte_level(), added=long)) == 100
    assert longest_token(changed(composing(), added=long)) == 400
    # A run of spaces is no longer before composition.
    spaces = AddedToken(" " * 300, normalized=False)
    assert longest_token(changed(composing(), added=spaces)) == 300
    # Llama 2's space before a text belongs to an added token that is found in normalized text.
    token = AddedToken("x" * 100, normalized=True)
    assert longest_token(changed(sentencepiece(), added=token)) == 103


@pytest.mark.parametrize("make", [byte_level, without_some_bytes, sentencepiece, composing])
@given(
    text=st.lists(
        st.one_of(
            st.characters(codec="utf-8"),
            st.sampled_from(
                [
                    "\u212a",
                    "\u1fbe\u0308\u0301",
                    "\u1fef",
                    "<|end|>",
                    "   ",
                    "▁▁",
                    "\x16",
                    "th\x16e",
                ]
            ),
        ),
        max_size=40,
    ).map("".join)
)
def test_no_text_has_fewer_tokens_than_its_length_says(
    make: Callable[[], Tokenizer], text: str
) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    counted = text.encode().translate(None, lost_bytes(tokenizer))
    assert len(counted) <= longest_token(tokenizer) * len(ids)


def test_bytes_without_tokens_do_not_count() -> None:
    assert lost_bytes(byte_level()) == lost_bytes(sentencepiece()) == b""
    assert b"\x16" in lost_bytes(without_some_bytes())
    assert not set(b"the ") & set(lost_bytes(without_some_bytes()))
    assert longest_token(without_some_bytes()) == longest_token(byte_level())
    model = text_model(without_some_bytes())
    model.check_length("\x16" * 9999, 3)  # which is no token at all
    with pytest.raises(TextModelError, match="the context holds 3"):
        model.check_length("\x16the" * 9999, 3)


def test_composition_makes_a_byte_of_four_at_most() -> None:
    """Every character with all that may become a part of it: a mark brings its own bytes, what is
    left of a character's belongs to its first part."""
    share: dict[str, int] = {}
    everything = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for char in everything:
        first, *marks = unicodedata.normalize("NFD", char)
        own = len(char.encode()) - sum(len(mark.encode()) for mark in marks)
        share[first] = max(share.get(first, 1), own)
    for char in everything:
        if unicodedata.normalize("NFC", char) == char:
            parts = unicodedata.normalize("NFD", char)
            most = sum(max(share.get(part, 1), len(part.encode())) for part in parts)
            one = char.isascii() and char not in "K`;"
            assert most <= (1 if one else 4 * len(char.encode())), hex(ord(char))


def unknown() -> Tokenizer:
    return Tokenizer(models.BPE(vocab={"<unk>": 0, "a": 1}, merges=[], unk_token="<unk>"))


SWALLOWING = {
    "white space beside a token": lambda: changed(
        byte_level(), added=AddedToken("<|pad|>", rstrip=True)
    ),
    "unknown characters": unknown,
    "unknown bytes": lambda: changed(unknown(), pre_tokenizer=pre_tokenizers.ByteLevel()),
    "words without tokens": lambda: Tokenizer(
        models.WordPiece(vocab={"<unk>": 0, "a": 1}, unk_token="<unk>")
    ),
    "runs of unknown": lambda: Tokenizer(
        models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, byte_fallback=False)
    ),
    "a pre-tokenizer that removes": lambda: changed(
        sentencepiece(), pre_tokenizer=pre_tokenizers.Split(" ", "removed")
    ),
    "white space between words": lambda: changed(
        sentencepiece(), pre_tokenizer=pre_tokenizers.WhitespaceSplit()
    ),
    "bytes without tokens that composition makes": lambda: changed(
        without_some_bytes(), normalizer=normalizers.NFC()
    ),
    "strip": lambda: changed(byte_level(), normalizer=normalizers.Strip()),
    "NFKC": lambda: changed(byte_level(), normalizer=normalizers.NFKC()),
    "a pattern replaced": lambda: changed(
        byte_level(), normalizer=normalizers.Replace(Regex(" +"), " ")
    ),
    "a text shortened": lambda: changed(byte_level(), normalizer=normalizers.Replace("aa", "a")),
    "more than composition": lambda: changed(
        byte_level(),
        normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Replace("é", "ab")]),
    ),
}


@pytest.mark.parametrize("make", SWALLOWING.values(), ids=SWALLOWING)
def test_where_text_can_be_swallowed_there_is_no_limit(make: Callable[[], Tokenizer]) -> None:
    assert longest_token(make()) == 0
