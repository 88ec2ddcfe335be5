"""Tokenizers of GGUF files, rebuilt as the originals."""

from __future__ import annotations

import json
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from albireo.ipc.protocol import ChatMessage
from albireo.workers.tokenizer.text_model import TextModel, TextModelError, load_text_model

from .test_chat_template import GEMMA
from .tiny_tokenizers import NASTY_TEXTS, byte_level, sentencepiece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
DEMO_MODEL = os.environ.get("ALBIREO_DEMO_MODEL", "")
needs_demo = pytest.mark.skipif(not DEMO_MODEL, reason="ALBIREO_DEMO_MODEL is not set")


def write_gguf(path: Path, architecture: str = "llama", **values: Any) -> Path:
    """A file without tensors; "pre" means tokenizer.ggml.pre, None leaves a key out."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in values.items():
        if value is None:
            continue
        key = f"tokenizer.{name}" if name == "chat_template" else f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_level_values(pre: str | None, /, **changes: Any) -> dict[str, Any]:
    """The tiny byte-level tokenizer as a converter would write it."""
    layout = json.loads(byte_level().to_str())
    tokens = sorted(byte_level().get_vocab().items(), key=lambda item: item[1])
    types = [NORMAL] * len(tokens)
    for added in layout["added_tokens"]:
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [token for token, _ in tokens] + ["[PAD1]", "[PAD2]"],
        "token_type": [*types, UNUSED, UNUSED],
        "merges": [" ".join(merge) for merge in layout["model"]["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "add_bos_token": True,
    }
    return values | changes


@pytest.mark.parametrize(
    ("pre", "written", "begins"),
    [
        ("gpt-2", None, False),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("gpt-2", True, True),
    ],
)
def test_the_begin_token(tmp_path: Path, pre: str, written: bool | None, begins: bool) -> None:
    values = byte_level_values(pre, add_bos_token=written)
    ours = load_text_model(str(write_gguf(tmp_path / "m.gguf", **values)))
    assert (ours.encode("x", True)[0] == 0) == begins
    assert 0 not in ours.encode("x", False)


def test_end_tokens_and_templates(tmp_path: Path) -> None:
    values = byte_level_values("gpt-2", add_eos_token=True, chat_template="{{ eos_token }}!")
    ours = load_text_model(str(write_gguf(tmp_path / "m.gguf", **values)))
    ids = ours.encode("x", True)
    assert (ids[0], ids[-1]) == (0, 1)
    assert ours.render_chat([ChatMessage(role="user", content="x")]) == "<|end|>!"


@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED])
def test_end_tokens_are_special_whatever_their_type(tmp_path: Path, kind: int) -> None:
    plain = byte_level_values("gpt-2")
    first = len(plain["tokens"])
    ends = range(first, first + 4)
    values = byte_level_values(
        "gpt-2",
        tokens=[*plain["tokens"], "<eos>", "<eot>", "<eom>", "<|im_end|>"],
        token_type=[*plain["token_type"], kind, kind, kind, USER_DEFINED],
        eos_token_id=ends[0],
        eot_token_id=ends[1],
        eom_token_id=ends[2],
    )
    ours = load_text_model(str(write_gguf(tmp_path / "m.gguf", **values)))
    assert ours.special_ids == {0, 1, 2, 3, *ends}
    assert ours.decode(list(ends), skip_special_tokens=True) == ""
    assert ours.encode("<eos><eot><eom><|im_end|>", False) == list(ends)


# ---------------------------------------------------------------- SentencePiece


def sentencepiece_values(**changes: Any) -> dict[str, Any]:
    """The tiny SentencePiece tokenizer: pieces score worse the later they were learned."""
    pieces = [piece for piece, _ in sorted(sentencepiece().get_vocab().items(), key=lambda p: p[1])]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(pieces) - 259)]
    values = {
        "model": "llama",
        "tokens": [*pieces, "<tool>"],
        "scores": [float(-index) for index in range(len(pieces) + 1)],
        "token_type": [*types, USER_DEFINED],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return values | changes


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    path = tmp_path_factory.mktemp("sentencepiece") / "m.gguf"
    return load_text_model(str(write_gguf(path, **sentencepiece_values())))


def reference_encoding(text: str) -> list[int]:
    """SentencePiece BPE by its definition: join the neighbours whose union scores best."""
    vocabulary = {
        piece: index for piece, index in sentencepiece().get_vocab().items() if index > 258
    }
    symbols = list(("▁" + text).replace(" ", "▁")) if text else []
    while pairs := [
        (vocabulary[left + right], at)
        for at, (left, right) in enumerate(pairwise(symbols))
        if left + right in vocabulary
    ]:
        _, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    ids: list[int] = []
    for symbol in symbols:
        index = vocabulary.get(symbol)
        ids += [index] if index is not None else [3 + byte for byte in symbol.encode()]
    return ids


@given(text=st.text("the quick brown fox.12\n é世", max_size=30))
def test_sentencepiece_files_encode_by_definition(
    sentencepiece_model: TextModel, text: str
) -> None:
    assert sentencepiece_model.encode(text, add_special_tokens=False) == reference_encoding(text)


def test_sentencepiece_special_tokens(sentencepiece_model: TextModel) -> None:
    ours = sentencepiece_model
    tool = ours.vocab_size - 1
    assert ours.special_ids == {0, 1, 2}
    assert ours.encode("x", True) == [1, *ours.encode("x", False)]
    # As in llama.cpp, the text after a special token begins with a space of its own.
    assert ours.encode("x</s>x<tool>", False) == [
        *ours.encode("x", False), 2, *ours.encode("x", False), tool,
    ]  # fmt: skip
    assert ours.decode(ours.encode("quick é<tool>", True), True) == "quick é<tool>"
    assert ours.token_bytes is None


def test_sentencepiece_without_space_prefix(tmp_path: Path) -> None:
    values = sentencepiece_values(add_space_prefix=False, add_bos_token=False)
    ours = load_text_model(str(write_gguf(tmp_path / "m.gguf", **values)))
    ids = ours.encode(" x", True)
    assert len(ids) == len(ours.encode("x", True)) + 1
    assert ours.decode(ids, True) == " x"


def test_a_gemma_file(tmp_path: Path) -> None:
    """No space before a text, runs of spaces and lines as tokens, turns between control tokens."""
    plain = sentencepiece_values()
    added = [(" " * 2, USER_DEFINED), ("\n\n", USER_DEFINED)]
    added += [("<start_of_turn>", CONTROL), ("<end_of_turn>", CONTROL)]
    values = sentencepiece_values(
        tokens=[*plain["tokens"], *(token for token, _ in added)],
        scores=[*plain["scores"], *[-1000.0] * len(added)],
        token_type=[*plain["token_type"], *(kind for _, kind in added)],
        add_space_prefix=False,
        chat_template=GEMMA,
    )
    ours = load_text_model(str(write_gguf(tmp_path / "m.gguf", **values)))
    size = len(plain["tokens"])
    spaces, lines, start, end = range(size, size + 4)
    assert ours.special_ids >= {1, 2, start, end}
    for text in ("  the", "a  b\n\nc", "the quick\n brown "):
        ids = ours.encode(text, False)
        assert (spaces in ids) == ("  " in text) and (lines in ids) == ("\n\n" in text)
        assert ours.decode(ids, False) == text
    ids = ours.encode_chat([ChatMessage(role="user", content="Hi")])
    assert ids[:2] == [1, start] and ids.count(1) == 1
    assert [ids.count(start), ids.count(end)] == [2, 1]
    assert ours.decode(ids, True) == "user\nHi\nmodel\n"


@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED])
def test_a_phi3_file(tmp_path: Path, kind: int) -> None:
    """Phi-3's own tokenizer drops white space behind its tokens, but for three of them."""
    plain = sentencepiece_values()
    keeping, dropping = ["<|endoftext|>"], ["<|assistant|>", "<|user|>", "<|end|>"]
    added = [*keeping, *dropping]
    values = sentencepiece_values(
        tokens=[*plain["tokens"], *added],
        scores=[*plain["scores"], *[-1000.0] * len(added)],
        token_type=[*plain["token_type"], *[kind] * len(added)],
        eos_token_id=len(plain["tokens"]),
    )
    theirs = Tokenizer.from_str(sentencepiece().to_str())
    theirs.add_tokens([AddedToken("<tool>", normalized=False, rstrip=True)])
    theirs.add_special_tokens([AddedToken(each, normalized=False) for each in keeping])
    theirs.add_special_tokens(
        [AddedToken(each, normalized=False, rstrip=True) for each in [*dropping, "</s>"]]
    )
    phi3 = load_text_model(str(write_gguf(tmp_path / "phi3.gguf", "phi3", **values)))
    llama = load_text_model(str(write_gguf(tmp_path / "llama.gguf", "llama", **values)))
    for text in (
        "<|user|>\nthe fox<|end|>\n<|assistant|>\n",
        "<s> the</s> \n fox<|endoftext|> \n quick<tool> brown<unk>  dog",
    ):
        assert phi3.encode(text, False) == theirs.encode(text, add_special_tokens=False).ids
        assert len(llama.encode(text, False)) > len(phi3.encode(text, False))


# ---------------------------------------------------------------- files that cannot be used


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "rwkv"}, "kind 'rwkv'"),
        ({"model": None}, r"no usable tokenizer\.ggml\.model"),
        ({"tokens": None}, r"no usable tokenizer\.ggml\.tokens"),
        ({"merges": None}, r"no usable tokenizer\.ggml\.merges"),
        ({"pre": "deepseek-v3"}, "pre-tokenizer 'deepseek-v3'.* is not supported"),
        ({"merges": ["not there"]}, "vocabulary of .* is not usable"),
        ({"token_type": [1, 1]}, "tokens but 2 token types"),
        ({"bos_token_id": 99999}, r"bos_token_id is 99999, which is none of its \d+ tokens"),
        ({"bos_token_id": None}, r"but no tokenizer\.ggml\.bos_token_id"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "same token twice"),
        ({"model": "llama", "merges": None}, r"no usable tokenizer\.ggml\.scores"),
        ({"model": "llama", "scores": [0.5]}, "tokens but 1 token scores"),
    ],
)
def test_unusable_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", **byte_level_values("gpt-2", **changes))
    with pytest.raises(TextModelError, match=message):
        load_text_model(str(path))


def test_a_truncated_file_is_an_error_at_every_length(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf", **byte_level_values("gpt-2")).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(64), *range(64, len(whole), 997)]:
        cut.write_bytes(whole[:length])
        with pytest.raises(TextModelError):
            load_text_model(str(cut))


# ---------------------------------------------------------------- the demo model

# From transformers' conversion of the same file, with the digits step of the original added.
DEMO_IDS = {
    "Hello world": [19556, 905],
    "12345 67 8": [33, 34, 35, 36, 37, 216, 38, 39, 216, 40],
    "In 2024, 3.14 and x²: ½ of 1,000!": [
        788, 216, 34, 32, 34, 36, 28, 216, 35, 30, 33, 36, 284, 1792, 19133, 42, 216, 16738, 282,
        216, 33, 28, 32, 32, 32, 17,
    ],
    "naïve café Straße — “quotes” … ½": [
        3546, 46494, 37366, 19144, 34878, 85, 1841, 619, 385, 2346, 573, 5548, 216, 16738,
    ],
    "e\u0301 vs é, a\u030a vs å": [
        85, 151, 219, 6375, 26411, 28, 253, 151, 228, 6375, 5549, 115,
    ],
    "今日は世界、": [15076, 228, 23274, 115, 7365, 124, 7906, 240, 178, 239, 230, 29917],
    "👩‍👩‍👧 🙂🙃": [
        10813, 235, 119, 321, 231, 10813, 235, 119, 321, 231, 10813, 235, 117, 47526,
        10813, 243, 221,
    ],
    "\x00\x01\x7f\u200b\ufeff": [190, 191, 217, 321, 229, 186, 136, 140],
    "a\ufffdb \ufffd": [81, 24211, 82, 216, 24211],
    "<|im_start|>user\r\nHi<|im_end|>  ": [1, 4093, 201, 198, 26843, 2, 256],
}  # fmt: skip


@pytest.mark.demo
@needs_demo
def test_demo_model() -> None:
    begin = time.perf_counter()
    ours = load_text_model(DEMO_MODEL)
    assert time.perf_counter() - begin < 2.0
    assert ours.vocab_size == 49_152
    assert ours.special_ids == set(range(17))
    for text, ids in DEMO_IDS.items():
        assert ours.encode(text, True) == ids
        assert ours.decode(ids, False) == text
    for text in NASTY_TEXTS:
        assert ours.decode(ours.encode(text, False), False) == text
    assert ours.render_chat([ChatMessage(role="user", content="Hi")]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
