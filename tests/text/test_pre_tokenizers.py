"""How a GGUF file's text is cut before byte-level BPE: as the original tokenizer does it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from albireo.workers.tokenizer.text_model import load_text_model

from .test_gguf import NORMAL, byte_level_values, write_gguf
from .tiny_tokenizers import NASTY_TEXTS, byte_level


def original(pre: str) -> Tokenizer:
    """The tokenizer that the family's own tokenizer.json describes, with our vocabulary."""
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    contraction = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    rest = r"\s*[\r\n]+|\s+(?!\S)|\s+"
    marks = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    words = rf"{contraction}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
    if pre == "gpt-4o":
        upper, lower = (
            rf"[{kinds}\p{{Lm}}\p{{Lo}}\p{{M}}]" for kinds in (r"\p{Lu}\p{Lt}", r"\p{Ll}")
        )
        words = "|".join(
            rf"[^\r\n\p{{L}}\p{{N}}]?{letters}{contraction}?"
            for letters in (f"{upper}*{lower}+", f"{upper}+{lower}*")
        )
        marks = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
    three = r"\p{N}{1,3}"
    digits = {"dbrx": three, "gpt-4o": three, "llama-bpe": three, "qwen2": r"\p{N}"}.get(pre)
    if digits:
        tokenizer.model.ignore_merges = pre == "llama-bpe"
        pattern = f"{words}|{digits}|{marks}|{rest}"
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    if pre == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    return tokenizer


@pytest.mark.parametrize(
    "pre", ["gpt-2", "default", "smollm", "llama-bpe", "qwen2", "dbrx", "gpt-4o"]
)
def test_byte_level_files_are_the_original_tokenizer(tmp_path: Path, pre: str) -> None:
    ours = load_text_model(str(write_gguf(tmp_path / "m.gguf", **byte_level_values(pre))))
    theirs = original(pre)
    size = theirs.get_vocab_size()
    assert ours.vocab_size == size + 2
    assert ours.token_bytes is not None and ours.token_bytes[size:] == [b"", b""]
    assert ours.special_ids == {0, 1, 2, 3}
    for text in [*NASTY_TEXTS, "can't WON'T 1234567 2nd ٣٤ Ⅷ", "[PAD1]"]:
        for special in (False, True):
            ids = ours.encode(text, special)
            assert ids == theirs.encode(text, add_special_tokens=special).ids
            assert ours.decode(ids, special) == theirs.decode(ids, skip_special_tokens=special)


def test_digits_are_cut_as_the_family_does(tmp_path: Path) -> None:
    cuts = {}
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "dbrx", "gpt-4o"):
        path = write_gguf(tmp_path / f"{pre}.gguf", **byte_level_values(pre, merges=["1 2", "3 4"]))
        cuts[pre] = len(load_text_model(str(path)).encode("1234", add_special_tokens=False))
    # The vocabulary holds "12" and "34", so only single digits and "123" + "4" cost more.
    assert cuts == {
        "gpt-2": 2, "smollm": 4, "llama-bpe": 3, "qwen2": 4, "tekken": 4, "dbrx": 3, "gpt-4o": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "pair", "joined_by"),
    [
        ("xaBc", "aB", {"dbrx", "qwen2"}),
        ("Can't", "n'", {"gpt-4o"}),
        ("!\n/", "Ċ/", {"tekken", "gpt-4o"}),
    ],
)
def test_where_words_and_marks_are_cut(
    tmp_path: Path, text: str, pair: str, joined_by: set[str]
) -> None:
    found = set()
    for pre in ("dbrx", "gpt-4o", "qwen2", "tekken"):
        values = byte_level_values(pre, merges=[" ".join(pair)])
        values["tokens"] = [*values["tokens"][:-1], pair]
        values["token_type"] = [*values["token_type"][:-1], NORMAL]
        ours = load_text_model(str(write_gguf(tmp_path / f"{pre}.gguf", **values)))
        if len(values["tokens"]) - 1 in ours.encode(text, add_special_tokens=False):
            found.add(pre)
    assert found == joined_by
