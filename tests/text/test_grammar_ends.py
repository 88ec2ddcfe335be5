"""What rows without a token mean for an answer whose grammar they end."""

from __future__ import annotations

import pytest

from albireo.ipc.plan import (
    ROW_GRAMMAR_END,
    ROW_GRAMMAR_FAILED,
    ROW_NOT_FINITE,
    ROW_NOTHING_ALLOWED,
)
from albireo.ipc.protocol import End

from .test_request import byte_tokens, detokenizer, encode, submission


def test_a_grammar_that_ends_gives_what_was_held_back() -> None:
    tokens = encode("abc st")
    made = detokenizer(submission(stop=("stop",)))
    for token in tokens:
        assert made.add_rows([(7, 1, token)]) == ([], [])
    assert made.add_rows([(7, 0, ROW_GRAMMAR_END)]) == ([], [])
    (piece,) = made.take_pieces()
    assert piece.text == "abc st"
    assert piece.token_ids == tokens
    assert piece.end == End("stop", None, 3, len(tokens))
    assert made.add_rows([(7, 0, ROW_GRAMMAR_END)]) == ([], [])
    assert made.take_pieces() == []


@pytest.mark.parametrize("include", [False, True])
def test_what_an_unfinished_character_becomes_stands_behind_what_was_held_back(
    include: bool,
) -> None:
    """As it does where a token ends the answer; a stop string may end with it."""
    for stop, text, reason in (("stop", "a st\ufffd", None), ("t\ufffd", "a s", "t\ufffd")):
        made = detokenizer(submission(stop=(stop,), include_stop=include))
        for token in byte_tokens("a st世")[:-1]:
            made.add_rows([(7, 1, token)])
        made.add_rows([(7, 0, ROW_GRAMMAR_END)])
        (piece,) = made.take_pieces()
        assert piece.text == (text + stop if include and reason else text)
        assert piece.end == End("stop", reason, 3, 6)


@pytest.mark.parametrize(
    ("why", "code", "said"),
    [
        (ROW_NOT_FINITE, "internal", "not finite"),
        (ROW_GRAMMAR_FAILED, "invalid_request", "too complex"),
        (ROW_NOTHING_ALLOWED, "invalid_request", "no token is left"),
    ],
)
def test_a_row_that_fails_says_why(why: int, code: str, said: str) -> None:
    made = detokenizer(submission())
    stopped, (refused,) = made.add_rows([(7, 0, why)])
    assert not stopped
    assert (refused.request, refused.code) == (7, code)
    assert said in refused.message
    assert made.take_pieces() == []
