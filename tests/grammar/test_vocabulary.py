"""Tokens as matchers see them: bytes, special ones, the end, what has no text."""

from __future__ import annotations

import pytest

from albireo.ipc.grammars import Grammar
from albireo.workers.grammar.compile import grammar_text
from albireo.workers.grammar.vocabulary import Vocabulary, end_ids_of

from ..text.tiny_tokenizers import SPECIAL, byte_level, sentencepiece, text_model
from .model import PADDING, encode, end_id, text, tokens_of, vocabulary

ANYTHING = "start: /(.|\\n)*/"


def allowed(grammar: str, consumed: str = "") -> set[int]:
    matcher = vocabulary().matcher(grammar)
    assert matcher.consume_tokens(encode(consumed)), matcher.get_error()
    found = tokens_of(matcher.compute_bitmask())
    assert not matcher.is_error(), matcher.get_error()
    return found


def test_free_text_allows_every_token_but_special_ones_and_padding() -> None:
    found = allowed(ANYTHING)
    special = text().special_ids
    assert end_id() in found
    assert found & special == {end_id()}
    assert max(found) < text().vocab_size
    assert text().token_bytes is not None
    whole = {
        token
        for token, piece in enumerate(text().token_bytes)
        if token not in special and piece and is_text(piece)
    }
    assert whole <= found


def is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_a_special_token_is_no_text() -> None:
    name = SPECIAL[1]
    token = byte_level().token_to_id(name)
    assert token not in allowed(f'start: "{name}"')
    assert allowed(f"start: {name}") == {token}


def test_characters_of_several_bytes_come_byte_by_byte() -> None:
    assert text().token_bytes is not None
    rest = b""
    matcher = vocabulary().matcher('start: "世é👩"')
    while not matcher.is_stopped():
        token = min(tokens_of(matcher.compute_bitmask()), key=lambda t: len(text().token_bytes[t]))  # type: ignore[index]
        rest += text().token_bytes[token]
        assert matcher.consume_token(token)
    assert rest.decode() == "世é👩"


def test_the_end_is_allowed_only_where_the_grammar_accepts() -> None:
    assert end_id() not in allowed("start: /a+b?/")
    assert end_id() in allowed("start: /a+b?/", "a")
    matcher = vocabulary().matcher("start: /a+b/")
    assert matcher.consume_tokens(encode("ab"))
    assert matcher.is_stopped()


def test_an_end_token_that_is_not_special_is_no_text() -> None:
    plain = byte_level().token_to_id("é x")
    assert plain is not None and plain not in text().special_ids
    for ends in ([plain], [end_id(), plain]):
        made = Vocabulary(text(), text().vocab_size, ends)
        matcher = made.matcher(r"start: /(.|\n)*END/")
        assert plain not in tokens_of(matcher.compute_bitmask())
        assert matcher.consume_tokens(encode("END"))
        assert tokens_of(matcher.compute_bitmask()) >= set(ends)


def test_sentencepiece_and_word_marks() -> None:
    model = text_model(sentencepiece())
    end = model.vocab_size - 1
    made = Vocabulary(model, model.vocab_size + PADDING, [end])
    matcher = made.matcher(grammar_text(Grammar(choice=("a é🙃",))))
    written = b""
    table = [sentencepiece().id_to_token(each) for each in range(model.vocab_size)]
    while not matcher.is_stopped():
        token = max(tokens_of(matcher.compute_bitmask()), key=lambda t: len(table[t] or ""))
        piece = table[token]
        assert piece is not None
        is_byte = piece.startswith("<0x")
        written += bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("▁", " ").encode()
        assert matcher.consume_token(token), matcher.get_error()
    assert written.decode() == "a é🙃"


@pytest.mark.parametrize(("asked", "found"), [((1, 1, 9999), [1]), ((), [])])
def test_end_tokens_that_the_tokenizer_lacks_are_none(
    asked: tuple[int, ...], found: list[int]
) -> None:
    assert end_ids_of(text(), asked) == found
