"""A request from its tokens to its pieces: text, ends, counts, and what merging keeps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.ipc.messages import Piece, Submit
from albireo.ipc.protocol import End
from albireo.workers.detokenizer.detokenizer import Detokenizer
from albireo.workers.detokenizer.stream import stream_factory

from .tiny_tokenizers import byte_level, text_model

MODEL = text_model(byte_level())
STREAMS = stream_factory(MODEL, MODEL.vocab_size)
END = byte_level().token_to_id("<|end|>")


def submission(request: int = 7, **changes: Any) -> Submit:
    values: dict[str, Any] = {
        "request": request,
        "prompt_ids": [1, 2, 3],
        "max_tokens": 100,
        "min_tokens": 0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": 0,
        "stop": (),
        "stop_token_ids": (END,),
        "include_stop": False,
        "skip_special_tokens": True,
    }
    return Submit(**(values | changes))


def detokenizer(*requests: Submit) -> Detokenizer:
    made = Detokenizer(STREAMS, MODEL.bytes_of, (END,))
    for request in requests:
        made.submit(request)
    return made


def encode(text: str) -> list[int]:
    return MODEL.encode(text, add_special_tokens=False)


def byte_tokens(text: str) -> list[int]:
    assert MODEL.token_bytes is not None
    return [MODEL.token_bytes.index(bytes([byte])) for byte in text.encode()]


def run(request: Submit, tokens: list[int]) -> tuple[Piece, list[int]]:
    """All that a request has to say about these tokens, and the aborts for the scheduler."""
    made = detokenizer(request)
    aborts = []
    for token in tokens:
        stopped, refused = made.add_rows([(request.request, 1, token)])
        assert not refused
        aborts += stopped
    (piece,) = made.take_pieces()
    return piece, aborts


def test_tokens_become_pieces_with_their_index() -> None:
    made = detokenizer(submission())
    tokens = encode("The quick brown fox")
    for index, token in enumerate(tokens):
        made.add_rows([(7, 1, token)])
        assert made.take_pieces() == [Piece(7, index, [token], MODEL.decode([token], True), None)]
    assert made.take_pieces() == []


def test_pieces_that_wait_are_merged() -> None:
    made = detokenizer(submission(7), submission(8))
    tokens = encode("The quick brown fox")
    for token in tokens:
        made.add_rows([(7, 1, token), (8, 1, token)])
    assert made.take_pieces() == [
        Piece(request, 0, tokens, "The quick brown fox", None) for request in (7, 8)
    ]


def test_an_end_token_ends_the_answer_without_its_text_or_a_reason() -> None:
    tokens = [*encode("fox"), END]
    piece, aborts = run(submission(skip_special_tokens=False), [*tokens, 5, 6])
    assert piece == Piece(7, 0, tokens, "fox", End("stop", None, 3, len(tokens)))
    assert aborts == []


def test_a_stop_token_of_the_request_is_the_reason() -> None:
    (dog,) = byte_tokens("d")
    piece, aborts = run(submission(stop_token_ids=(END, dog)), [*byte_tokens("a d"), 5])
    assert (piece.text, piece.end) == ("a ", End("stop", dog, 3, 3))
    assert aborts == []


def test_stop_tokens_before_min_tokens_do_not_count() -> None:
    piece, _ = run(submission(min_tokens=3), [END, *byte_tokens("a"), END, *byte_tokens("b")])
    assert (piece.text, piece.end) == ("a", End("stop", None, 3, 3))


def test_the_length_ends_the_answer_and_shows_its_last_token() -> None:
    tokens = byte_tokens("abc")
    piece, aborts = run(submission(max_tokens=3), [*tokens, *tokens])
    assert piece == Piece(7, 0, tokens, "abc", End("length", None, 3, 3))
    assert aborts == []


def test_an_incomplete_character_at_the_end_is_a_replacement_character() -> None:
    piece, _ = run(submission(max_tokens=2), byte_tokens("世"))
    assert (piece.text, len(piece.token_ids)) == ("\ufffd", 2)
    piece, _ = run(submission(), [*byte_tokens("世")[:2], END])
    assert piece.text == "\ufffd"


def test_a_stop_string_ends_the_answer_and_is_told_to_the_scheduler() -> None:
    piece, aborts = run(submission(stop=("ST",)), byte_tokens("abSTcd"))
    assert (piece.text, piece.end) == ("ab", End("stop", "ST", 3, 4))
    assert piece.token_ids == byte_tokens("abST")
    assert aborts == [7]


def test_a_stop_string_can_be_kept() -> None:
    piece, _ = run(submission(stop=("ST",), include_stop=True), byte_tokens("abSTcd"))
    assert (piece.text, piece.end) == ("abST", End("stop", "ST", 3, 4))


def test_a_stop_string_beats_the_length() -> None:
    piece, _ = run(submission(stop=("ST",), max_tokens=4), byte_tokens("abST"))
    assert (piece.text, piece.end) == ("ab", End("stop", "ST", 3, 4))


def test_a_stop_string_before_min_tokens_is_text() -> None:
    piece, _ = run(submission(stop=("ST",), min_tokens=5), byte_tokens("abSTcdST"))
    assert (piece.text, piece.end) == ("abSTcd", End("stop", "ST", 3, 8))


def test_what_a_possible_stop_string_held_back_comes_at_the_end() -> None:
    piece, _ = run(submission(stop=("STOP",), max_tokens=4), byte_tokens("abST"))
    assert (piece.text, piece.end) == ("abST", End("length", None, 3, 4))
    piece, _ = run(submission(stop=("STOP",)), [*byte_tokens("abST"), END])
    assert (piece.text, piece.end) == ("abST", End("stop", None, 3, 5))


def test_rows_without_a_known_request_are_ignored() -> None:
    made = detokenizer(submission(7), submission(8))
    made.drop(8)
    assert made.add_rows([(8, 1, 5), (9, 1, 5), (8, 0, 0)]) == ([], [])
    assert made.take_pieces() == []


def test_dropping_and_resetting_take_back_what_was_not_sent() -> None:
    made = detokenizer(submission(7), submission(8))
    made.add_rows([(7, 1, 40), (8, 1, 40)])
    made.drop(7)
    assert [piece.request for piece in made.take_pieces()] == [8]
    made.add_rows([(8, 1, 40)])
    made.reset()
    assert made.take_pieces() == []


def test_logits_that_are_not_finite_refuse_the_request() -> None:
    made = detokenizer(submission(7), submission(8))
    made.add_rows([(7, 1, 40)])
    stopped, (refused,) = made.add_rows([(7, 0, 0), (8, 1, 40)])
    assert (refused.request, refused.code, stopped) == (7, "internal", [])
    assert "not finite" in refused.message
    assert [piece.request for piece in made.take_pieces()] == [8]


@given(
    tokens=st.lists(st.integers(0, MODEL.vocab_size - 1), max_size=40),
    cuts=st.sets(st.integers(0, 40)),
    skip=st.booleans(),
    max_tokens=st.integers(1, 40),
)
def test_pieces_join_to_the_answer_wherever_they_are_cut(
    tokens: list[int], cuts: set[int], skip: bool, max_tokens: int
) -> None:
    made = detokenizer(
        submission(skip_special_tokens=skip, max_tokens=max_tokens, stop_token_ids=())
    )
    pieces: list[Piece] = []
    for number, token in enumerate(tokens):
        made.add_rows([(7, 1, token)])
        if number in cuts:
            pieces += made.take_pieces()
    pieces += made.take_pieces()
    shown = tokens[:max_tokens]
    assert [token for piece in pieces for token in piece.token_ids] == shown
    for piece, following in pairwise(pieces):
        assert following.index == piece.index + len(piece.token_ids) and piece.end is None
    text = "".join(piece.text for piece in pieces)
    whole = MODEL.decode(shown, skip)
    if len(tokens) >= max_tokens:
        assert pieces[-1].end == End("length", None, 3, max_tokens) and text == whole
    else:
        assert whole.startswith(text)


@pytest.mark.parametrize("stop", [(), ("never",)])
def test_a_matcher_changes_nothing_where_it_finds_nothing(stop: tuple[str, ...]) -> None:
    tokens = encode("今日は世界 🙂 e\u0301")
    piece, _ = run(submission(stop=stop, max_tokens=len(tokens)), tokens)
    assert piece.text == "今日は世界 🙂 e\u0301"


@given(st.text(max_size=30), st.data())
def test_a_resumed_request_goes_on_where_the_client_is(text: str, data: st.DataObject) -> None:
    """Held-back characters and stop strings in the making are where they were."""
    whole_tokens = data.draw(st.booleans())
    tokens = encode(text + "é stop here") if whole_tokens else byte_tokens(text + "é st")
    values: dict[str, Any] = {"stop": ("stop", "é s!"), "max_tokens": len(tokens)}
    whole, aborts = run(submission(**values), tokens)
    count = data.draw(st.integers(0, len(whole.token_ids) - 1))
    before = detokenizer(submission(**values))
    for token in tokens[:count]:
        before.add_rows([(7, 1, token)])
    first = "".join(each.text for each in before.take_pieces())
    resumed = submission(**values, prompt_ids=[1, 2, 3, *tokens[:count]], resumed=count)
    rest, later_aborts = run(resumed, tokens[count:])
    assert rest.index == count
    assert tokens[:count] + rest.token_ids == whole.token_ids
    assert first + rest.text == whole.text
    assert rest.end == whole.end and later_aborts == aborts
