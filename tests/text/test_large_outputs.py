"""What collects while the router gives no credit goes in Outputs of a bounded size."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from albireo.ipc.messages import Output, Piece
from albireo.ipc.output_lane import OUTPUT_BYTES
from albireo.ipc.plan import ROW_GRAMMAR_END
from albireo.workers.detokenizer.detokenizer import Detokenizer

from .test_logprobs import record
from .test_request import MODEL, byte_tokens, detokenizer, submission

ROOM = st.integers(1, 400)


def take_all(made: Detokenizer, room: int) -> list[list[Piece]]:
    """Every Output there is, as with one credit after the other."""
    outputs = []
    while pieces := made.take_pieces(room):
        outputs.append(pieces)
    return outputs


def joined(pieces: list[Piece]) -> Piece:
    """The parts of one request as the one piece that they are made of."""
    for part, following in pairwise(pieces):
        assert part.end is None
        assert following.index == part.index + len(part.token_ids)
    parts: list[list[Any]] = [[], [], []]
    for piece in pieces:
        parts[0] += piece.token_ids
        parts[1] += piece.logprobs or []
        parts[2] += piece.prompt_logprobs or []
    first, last = pieces[0], pieces[-1]
    return Piece(
        first.request, first.index, parts[0], "".join(piece.text for piece in pieces), last.end,
        None if first.logprobs is None else parts[1], parts[2] or None,
    )  # fmt: skip


def run(made: Detokenizer, tokens: list[int], prompt: int, logprobs: int) -> Detokenizer:
    """Positions of the prompt, and then tokens, scored."""
    made.add_logprobs(np.array([record(p, -0.5, 1, (9, -0.5)) for p in range(1, prompt)]), [])
    for at, token in enumerate(tokens):
        rows = [(7, 1, token)]
        if logprobs >= 0:
            best = [(9, -0.5)] * logprobs
            made.add_logprobs(np.array([record(prompt + at, -1.0, 1, *best)]), rows)
        made.add_rows(rows)
    return made


@given(
    tokens=st.lists(st.integers(0, MODEL.vocab_size - 1), max_size=30),
    prompt=st.integers(2, 6),
    logprobs=st.integers(-1, 3),
    stop=st.sampled_from([(), ("a", "st"), ("never",)]),
    room=ROOM,
)
def test_parts_join_to_the_whole_and_each_has_its_tokens_text(
    tokens: list[int], prompt: int, logprobs: int, stop: tuple[str, ...], room: int
) -> None:
    request = submission(
        prompt_ids=[5] * prompt, prompt_logprobs=1, logprobs=logprobs, stop=stop, max_tokens=25
    )
    (whole,) = run(detokenizer(request), tokens, prompt, logprobs).take_pieces()
    parts = [
        part for (part,) in take_all(run(detokenizer(request), tokens, prompt, logprobs), room)
    ]
    assert joined(parts) == whole
    # Who has a token has its text: an answer that goes on elsewhere goes on behind it.
    seen = 0
    for part in parts[:-1]:
        seen += len(part.token_ids)
        (until,) = run(detokenizer(request), tokens[:seen], prompt, logprobs).take_pieces()
        shown = "".join(each.text for each in parts[: parts.index(part) + 1])
        assert until.text == shown


def test_an_end_without_a_token_comes_with_the_last_part() -> None:
    made = run(detokenizer(submission(stop=("xyz",))), byte_tokens("abcdx"), 3, -1)
    made.add_rows([(7, 0, ROW_GRAMMAR_END)])
    outputs = take_all(made, 1)
    assert len(outputs) == 6
    assert outputs[-1][0].token_ids == [] and outputs[-1][0].text == "x"
    assert joined([part for (part,) in outputs]).text == "abcdx"


@given(requests=st.integers(1, 12), tokens=st.integers(1, 12), room=ROOM)
def test_who_has_no_room_is_first_in_the_next_output(requests: int, tokens: int, room: int) -> None:
    numbers = range(1, requests + 1)
    made = detokenizer(*(submission(number) for number in numbers))
    for token in byte_tokens("abcdefghijkl")[:tokens]:
        made.add_rows([(number, 1, token) for number in numbers])
    outputs = take_all(made, room)
    order = [piece.request for pieces in outputs for piece in pieces]
    assert order == sorted(order) and set(order) == set(numbers)
    for number in numbers:
        parts = [piece for pieces in outputs for piece in pieces if piece.request == number]
        assert joined(parts).text == "abcdefghijkl"[:tokens]


def test_an_end_does_not_wait_for_answers_that_go_on() -> None:
    """More comes all the time than an Output has room for."""
    made = detokenizer(submission(9, max_tokens=4), *(submission(number) for number in range(1, 5)))
    (token,) = byte_tokens("a")
    outputs = []
    for step in range(12):
        assert made.take_pieces(1, ends=False) == []
        made.add_rows([(number, 1, token) for number in (1, 2, 3, 4, 9)])
        if step > 2:
            outputs.append(made.take_pieces(1))
    ended = [pieces for pieces in outputs if pieces[-1].end is not None]
    assert ended and ended[0][-1].request == 9 and outputs.index(ended[0]) <= 4


def test_an_output_is_not_much_larger_than_it_says() -> None:
    """Many answers, and one that is too large alone, with all the logprobs there can be."""
    numbers = range(1, 9)
    made = detokenizer(*(submission(each, logprobs=20, max_tokens=9000) for each in numbers))
    scored = np.array([record(3, -0.123, 1, *[(400, -3.21)] * 20) for _ in numbers])
    scored[:, 0] = numbers
    for step in range(2600):
        some = numbers if step < 400 else numbers[:1]
        rows = [(number, 1, 400) for number in some]
        made.add_logprobs(scored[: len(some)], rows)
        made.add_rows(rows)
    outputs = take_all(made, OUTPUT_BYTES)
    sizes = [len(msgspec.msgpack.encode(Output(pieces))) for pieces in outputs]
    assert len(sizes) == 3 and max(sizes) < 1.5 * OUTPUT_BYTES
    assert sum(len(piece.token_ids) for pieces in outputs for piece in pieces) == 2600 + 7 * 400
