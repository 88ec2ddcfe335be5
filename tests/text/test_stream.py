"""Text as it streams is the text of decoding everything at once, however the tokens fall."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.workers.detokenizer.stream import TextStream, WindowStream, stream_factory
from albireo.workers.tokenizer.text_model import TextModel

from .tiny_tokenizers import NASTY_TEXTS, byte_level, sentencepiece, text_model

BYTE_LEVEL = text_model(byte_level())
SENTENCEPIECE = text_model(sentencepiece())
FIRST_BYTE = sentencepiece().token_to_id("<0x00>")
A_WORD = sentencepiece().token_to_id("a")


def pieces_of(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.add(token) for token in ids), stream.flush()]


def byte_level_stream(skip: bool, vocab_size: int = 0) -> TextStream:
    return stream_factory(BYTE_LEVEL, vocab_size)(skip)


@given(
    ids=st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=60),
    skip=st.booleans(),
)
def test_any_byte_level_tokens_stream_to_their_decoding(ids: list[int], skip: bool) -> None:
    assert "".join(pieces_of(byte_level_stream(skip), ids)) == BYTE_LEVEL.decode(ids, skip)


@given(text=st.text(max_size=40), skip=st.booleans())
def test_byte_level_text_survives_the_round_trip(text: str, skip: bool) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    assert "".join(pieces_of(byte_level_stream(skip), ids)) == BYTE_LEVEL.decode(ids, skip)


def test_every_single_token_has_the_text_of_the_library() -> None:
    for token in range(BYTE_LEVEL.vocab_size):
        for skip in (False, True):
            assert "".join(pieces_of(byte_level_stream(skip), [token])) == BYTE_LEVEL.decode(
                [token], skip
            )


@given(data=st.binary(max_size=24))
def test_invalid_utf8_becomes_replacement_characters_at_once(data: bytes) -> None:
    ids = [BYTE_LEVEL.token_bytes.index(bytes([byte])) for byte in data]  # type: ignore[union-attr]
    assert "".join(pieces_of(byte_level_stream(True), ids)) == data.decode("utf-8", "replace")


@pytest.mark.parametrize("character", ["é", "世", "🙂"])
def test_a_character_comes_with_its_last_byte(character: str) -> None:
    ids = [BYTE_LEVEL.token_bytes.index(bytes([byte])) for byte in character.encode()]  # type: ignore[union-attr]
    assert pieces_of(byte_level_stream(True), ids) == [""] * (len(ids) - 1) + [character, ""]


def test_a_special_token_does_not_part_a_character() -> None:
    first, second = (BYTE_LEVEL.token_bytes.index(bytes([byte])) for byte in "é".encode())  # type: ignore[union-attr]
    special = byte_level().token_to_id("<|end|>")
    assert pieces_of(byte_level_stream(True), [first, special, second]) == ["", "", "é", ""]
    shown = pieces_of(byte_level_stream(False), [first, special, second])
    assert shown == ["", "\ufffd<|end|>", "\ufffd", ""]


def test_padding_rows_of_the_embedding_have_no_text() -> None:
    stream = byte_level_stream(True, BYTE_LEVEL.vocab_size + 64)
    assert pieces_of(stream, [BYTE_LEVEL.vocab_size + 63, BYTE_LEVEL.vocab_size]) == ["", "", ""]


def test_padding_rows_do_not_part_a_character_of_a_window() -> None:
    first, second = (FIRST_BYTE + byte for byte in "é".encode())
    ids = [A_WORD, SENTENCEPIECE.vocab_size, first, SENTENCEPIECE.vocab_size + 63, second]
    for skip in (False, True):
        assert pieces_of(WindowStream(SENTENCEPIECE, skip), ids) == ["a", "", "", "", "é", ""]


def test_padding_rows_do_not_lengthen_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    decode, lengths = SENTENCEPIECE.decode_window, []

    def decode_window(ids: Sequence[int], skip: bool) -> str:
        lengths.append(len(ids))
        return decode(ids, skip)

    monkeypatch.setattr(SENTENCEPIECE, "decode_window", decode_window)
    ids = [A_WORD, *[SENTENCEPIECE.vocab_size] * 50, A_WORD]
    assert "".join(pieces_of(WindowStream(SENTENCEPIECE, True), ids)) == "aa"
    assert max(lengths) == 2


def pieces_and_runs() -> st.SearchStrategy[list[int]]:
    """Token ids whose byte tokens come in runs that are text, or are no text from their start."""
    first = FIRST_BYTE
    piece = st.integers(0, SENTENCEPIECE.vocab_size - 1).filter(
        lambda token: not first <= token < first + 256
    )
    characters = st.text(min_size=1, max_size=4).map(
        lambda text: [first + b for b in text.encode()]
    )
    garbage = st.lists(st.integers(0x80, 0xBF), min_size=1, max_size=9).map(
        lambda run: [first + byte for byte in run]
    )
    part = st.one_of(piece.map(lambda token: [token]), characters, garbage)

    def separate(parts: list[list[int]]) -> list[int]:
        return [token for part in parts for token in (*part, A_WORD)]

    return st.lists(part, max_size=12).map(separate)


@given(ids=pieces_and_runs(), skip=st.booleans())
def test_sentencepiece_tokens_stream_to_their_decoding(ids: list[int], skip: bool) -> None:
    stream = stream_factory(SENTENCEPIECE, 0)(skip)
    assert isinstance(stream, WindowStream)
    assert "".join(pieces_of(stream, ids)) == SENTENCEPIECE.decode(ids, skip)


@given(text=st.text(max_size=40))
def test_sentencepiece_text_survives_the_round_trip(text: str) -> None:
    ids = SENTENCEPIECE.encode(text, add_special_tokens=False)
    assert "".join(pieces_of(stream_factory(SENTENCEPIECE, 0)(True), ids)) == SENTENCEPIECE.decode(
        ids, True
    )


@given(run=st.binary(min_size=1, max_size=40))
def test_the_window_holds_back_no_more_than_a_character(run: bytes) -> None:
    """Even for bytes that never become text, something is shown after every fifth token."""
    stream = WindowStream(SENTENCEPIECE, False)
    silent = 0
    for byte in run:
        silent = 0 if stream.add(FIRST_BYTE + byte) else silent + 1
        assert silent <= 4


@pytest.mark.parametrize("model", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])
@pytest.mark.parametrize("text", NASTY_TEXTS)
def test_nasty_texts(model: TextModel, text: str) -> None:
    ids = model.encode(text, add_special_tokens=True)
    for skip in (False, True):
        assert "".join(pieces_of(stream_factory(model, 0)(skip), ids)) == model.decode(ids, skip)
