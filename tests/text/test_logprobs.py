"""Logprob records become what the client is told, each with its token."""

from __future__ import annotations

import numpy as np
import pytest

from albireo.ipc.messages import Piece
from albireo.ipc.plan import LOGPROB_WORDS, MAX_TOP_LOGPROBS, Int32Array

from .test_request import MODEL, byte_tokens, detokenizer, encode, submission
from .tiny_tokenizers import sentencepiece, text_model


def record(position: int, logprob: float, rank: int, *top: tuple[int, float]) -> Int32Array:
    made = np.full(LOGPROB_WORDS, -1, np.int32)
    made[:2] = 7, position
    made[3] = rank
    values = made.view(np.float32)
    values[2] = logprob
    for place, (token, score) in enumerate(top):
        made[4 + place] = token
        values[4 + MAX_TOP_LOGPROBS + place] = score
    return made


def only(pieces: list[Piece]) -> Piece:
    (found,) = pieces
    return found


def test_new_tokens_have_theirs() -> None:
    made = detokenizer(submission(logprobs=2))
    first, second = byte_tokens("é")
    for index, token in enumerate((first, second)):
        rows = [(7, 1, token)]
        made.add_logprobs(np.array([record(3 + index, -1.5, 2, (9, -0.5), (token, -1.5))]), rows)
        made.add_rows(rows)
    piece = only(made.take_pieces())
    assert piece.token_ids == [first, second] and piece.text == "é"
    assert piece.logprobs is not None and piece.prompt_logprobs is None
    assert [each.token.token_id for each in piece.logprobs] == [first, second]
    assert b"".join(each.token.text for each in piece.logprobs) == "é".encode()
    assert [each.token.rank for each in piece.logprobs] == [2, 2]
    assert [each.token_id for each in piece.logprobs[0].top] == [9, first]
    assert [each.rank for each in piece.logprobs[0].top] == [1, 2]


def test_no_more_best_ones_than_asked_for_or_than_there_are() -> None:
    made = detokenizer(submission(logprobs=3))
    rows = [(7, 1, 5)]
    made.add_logprobs(np.array([record(3, -0.1, 1, (5, -0.1), (6, -3.0))]), rows)
    made.add_rows(rows)
    found = only(made.take_pieces()).logprobs
    assert found is not None and len(found[0].top) == 2
    made = detokenizer(submission(logprobs=0))
    made.add_logprobs(np.array([record(3, -0.1, 1, (5, -0.1))]), rows)
    made.add_rows(rows)
    found = only(made.take_pieces()).logprobs
    assert found is not None and found[0].top == []


def test_the_prompt_is_scored_once_whatever_is_computed_again() -> None:
    prompt = encode("one two three four")
    assert len(prompt) >= 4
    made = detokenizer(submission(prompt_ids=prompt, prompt_logprobs=0))
    made.add_logprobs(np.array([record(p, -float(p), 1) for p in (1, 2)]), [])
    begin = only(made.take_pieces())
    assert begin.token_ids == [] and begin.logprobs is None
    # Preempted, and computed again from the start.
    made.add_logprobs(np.array([record(p, -9.0, 1) for p in (1, 2)]), [])
    rest = range(3, len(prompt))
    made.add_logprobs(np.array([record(p, -float(p), 1) for p in rest]), [])
    found = (begin.prompt_logprobs or []) + (only(made.take_pieces()).prompt_logprobs or [])
    assert [each.token.token_id for each in found] == prompt[1:]
    assert [each.token.logprob for each in found] == pytest.approx(
        [-float(p) for p in range(1, len(prompt))]
    )


def test_records_of_others_are_dropped() -> None:
    made = detokenizer(submission(8, logprobs=1))
    made.add_logprobs(np.array([record(3, -1.0, 1)]), [(7, 1, 5)])
    assert made.take_pieces() == []


def test_every_token_has_its_bytes_whatever_a_text_would_make_of_it_alone() -> None:
    assert MODEL.bytes_of(MODEL.vocab_size + 3) == b""
    model = text_model(sentencepiece())
    assert model.token_bytes is None
    assert model.bytes_of(model.vocab_size + 3) == b""
    for piece, found in {"▁t": b" t", "t": b"t", "<0xE4>": b"\xe4", "<s>": b"<s>"}.items():
        assert model.bytes_of(sentencepiece().token_to_id(piece)) == found
    text = "The quick 世界 🙂"
    ids = model.encode(text, add_special_tokens=False)
    assert b"".join(model.bytes_of(token) for token in ids) == f" {text}".encode()
