"""Stop strings against a search of the whole text, which is their definition."""

from __future__ import annotations

import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.workers.detokenizer.stop_strings import StopMatcher, automaton

# Few letters: stop strings then overlap, repeat and contain each other.
LETTERS = "abé"
stops_lists = st.lists(st.text(LETTERS, min_size=1, max_size=4), min_size=1, max_size=4)
pieces_lists = st.lists(st.text(LETTERS, max_size=4), max_size=12)


def reference(
    pieces: list[str], stops: list[str], include: bool, counts_from: int
) -> tuple[str, str | None]:
    """The first end of a stop string in a piece that counts; the longest one that ends there."""
    text = "".join(pieces)
    end = 0
    for number, piece in enumerate(pieces):
        for _ in piece:
            end += 1
            found = [stop for stop in stops if text[:end].endswith(stop)]
            if found and number >= counts_from:
                stop = max(found, key=len)
                return text[: end if include else end - len(stop)], stop
    return text, None


def run(
    pieces: list[str], stops: list[str], include: bool, counts_from: int
) -> tuple[str, str | None]:
    """As the matcher shows it, checking that nothing shown is ever taken back."""
    matcher = StopMatcher(tuple(stops), include)
    shown = ""
    for number, piece in enumerate(pieces):
        text, stop = matcher.add(piece, number >= counts_from)
        shown += text
        if stop is not None:
            return shown, stop
    return shown + matcher.flush(), None


@given(pieces_lists, stops_lists, st.booleans(), st.integers(0, 6))
def test_finds_what_a_search_of_the_whole_text_finds(
    pieces: list[str], stops: list[str], include: bool, counts_from: int
) -> None:
    assert run(pieces, stops, include, counts_from) == reference(
        pieces, stops, include, counts_from
    )


@given(pieces_lists, stops_lists)
def test_borders_of_tokens_do_not_matter(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    assert run(pieces, stops, False, 0) == run([whole], stops, False, 0)
    assert run(pieces, stops, False, 0) == run(list(whole), stops, False, 0)


@given(pieces_lists, stops_lists)
def test_holds_back_exactly_what_may_begin_a_stop_string(
    pieces: list[str], stops: list[str]
) -> None:
    matcher = StopMatcher(tuple(stops), False)
    text = shown = ""
    for piece in pieces:
        new, stop = matcher.add(piece, True)
        if stop is not None:
            return
        text += piece
        shown += new
        held = text[len(shown) :]
        longest = max(
            (k for stop in stops for k in range(len(stop)) if text.endswith(stop[:k])), default=0
        )
        assert text.startswith(shown) and len(held) == longest


@pytest.mark.parametrize(
    ("pieces", "stops", "include", "expected"),
    [
        (["Hello\n", "\nWorld"], ["\n\n"], False, ("Hello", "\n\n")),
        (["Hello\n", "\nWorld"], ["\n\n"], True, ("Hello\n\n", "\n\n")),
        (["one STO", "RE two"], ["STOP"], False, ("one STORE two", None)),
        (["aaab"], ["aab"], False, ("a", "aab")),
        # The first to be complete wins, also inside of one that began before.
        (["abcdef"], ["abcdef", "cd"], False, ("ab", "cd")),
        # Complete with the same character: the longer one.
        (["xabc"], ["bc", "abc"], False, ("x", "abc")),
        # A stop string at the very beginning leaves nothing.
        (["###"], ["###"], False, ("", "###")),
        # One at the end that is not complete is text.
        (["wait##"], ["###"], False, ("wait##", None)),
    ],
)
def test_examples(
    pieces: list[str], stops: list[str], include: bool, expected: tuple[str, str | None]
) -> None:
    assert run(pieces, stops, include, 0) == expected


def test_one_that_does_not_count_yet_is_text_and_may_be_part_of_a_later_one() -> None:
    assert run(["ab", "ab", "c"], ["ab", "babc"], False, 3) == ("ababc", None)
    assert run(["ab", "ab", "c"], ["ab", "babc"], False, 2) == ("a", "babc")


def test_an_automaton_is_shared_and_lives_as_long_as_its_requests() -> None:
    stops = ("one", "two")
    first, second = StopMatcher(stops, False), StopMatcher(stops, True)
    shared = weakref.ref(automaton(stops))
    assert first._automaton is second._automaton is shared()
    del first
    assert shared() is not None
    del second
    assert shared() is None
