"""The inbox: nothing is lost, repeated or reordered by merging, and waiters wake."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo.client import Delta, End, GroupFailed
from albireo.gateway.http import ClientGone
from albireo.gateway.inbox import Inbox, Whole, tokens_so_far

from .played import row

_STEP = st.tuples(
    st.integers(0, 1), st.integers(0, 2), st.text("ab", max_size=3), st.booleans(), st.booleans()
)


@settings(max_examples=200, deadline=None)
@given(st.lists(_STEP, max_size=200))
def test_merged_pieces_are_the_sum_of_their_deltas(
    steps: list[tuple[int, int, str, bool, bool]],
) -> None:
    inbox = Inbox(prompts=2, n=3)
    texts: dict[int, str] = {}
    rows: dict[int, int] = {}
    seen_texts: dict[int, str] = {}
    seen_rows: dict[int, int] = {}
    for prompt, choice, text, with_row, take in steps:
        number = prompt * 3 + choice
        found = [row(text)] if with_row else None
        inbox.put(prompt, Delta(9, 0, [1], text, None, choice, found))
        texts[number] = texts.get(number, "") + text
        rows[number] = rows.get(number, 0) + int(with_row)
        if take:
            for key, piece in inbox.take().items():
                seen_texts[key] = seen_texts.get(key, "") + piece.text
                seen_rows[key] = seen_rows.get(key, 0) + len(piece.logprobs or [])
    for key, piece in inbox.take().items():
        seen_texts[key] = seen_texts.get(key, "") + piece.text
        seen_rows[key] = seen_rows.get(key, 0) + len(piece.logprobs or [])
    assert seen_texts == texts
    assert seen_rows == rows


def test_merging_leaves_the_nodes_deltas_as_they_are() -> None:
    inbox = Inbox(1, 1)
    first = Delta(1, 0, [1], "a", None, 0, [row("a")])
    inbox.put(0, first)
    inbox.put(0, Delta(1, 1, [2], "b", End("stop", "x", 1, 2), 0, [row("b")]))
    piece = inbox.take()[0]
    assert (piece.text, len(piece.logprobs or []), piece.end) == ("ab", 2, End("stop", "x", 1, 2))
    assert (tokens_so_far(first), tokens_so_far(piece)) == (1, 2)
    assert len(first.logprobs or []) == 1
    assert inbox.open == 0


def test_logprobs_of_a_prompt_that_come_in_parts_are_joined() -> None:
    inbox = Inbox(1, 1)
    first = Delta(1, 0, [], "", None, 0, None, [row("a"), row("b")])
    inbox.put(0, first)
    inbox.put(0, Delta(1, 0, [1], "x"))
    inbox.put(0, Delta(1, 1, [2], "y", None, 0, None, [row("c")]))
    assert inbox.take()[0].prompt_logprobs == [row("a"), row("b"), row("c")]
    assert first.prompt_logprobs == [row("a"), row("b")]


def test_waiting() -> None:
    async def run() -> None:
        inbox = Inbox(1, 1)
        waiting = asyncio.ensure_future(inbox.wait())
        await asyncio.sleep(0)
        assert not waiting.done()
        inbox.put(0, Delta(1, 0, [1], "a"))
        await asyncio.wait_for(waiting, 1)
        everything = asyncio.ensure_future(inbox.wait_for_all())
        await asyncio.sleep(0)
        inbox.put(0, Delta(1, 1, [1], "b", End("stop", None, 1, 2)))
        await asyncio.wait_for(everything, 1)

    asyncio.run(run())


def test_a_client_that_leaves_wakes_who_waits() -> None:
    async def run() -> None:
        for wait in (Inbox.wait, Inbox.wait_for_all):
            inbox = Inbox(1, 1)
            waiting = asyncio.ensure_future(wait(inbox))
            await asyncio.sleep(0)
            inbox.leave()
            with pytest.raises(ClientGone):
                await asyncio.wait_for(waiting, 1)

    asyncio.run(run())


def test_the_first_error_is_kept() -> None:
    async def run() -> None:
        inbox = Inbox(2, 1)
        inbox.put(0, GroupFailed("first"))
        inbox.put(1, GroupFailed("second"))
        with pytest.raises(GroupFailed, match="first"):
            await inbox.wait_for_all()

    asyncio.run(run())


def test_an_interval_holds_tokens_but_the_first_and_the_last() -> None:
    async def run() -> list[str]:
        inbox = Inbox(1, 1)
        inbox.interval = 3
        written: list[str] = []

        async def write() -> None:
            while inbox.open:
                await inbox.wait()
                written.append("".join(each.text for each in inbox.take().values()))

        writing = asyncio.ensure_future(write())
        for place in range(9):
            end = End("length", None, 1, 9) if place == 8 else None
            inbox.put(0, Delta(1, place, [place], str(place), end))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await asyncio.wait_for(writing, 5)
        return written

    assert asyncio.run(run()) == ["0", "123", "456", "78"]


def test_an_interval_counts_from_the_first_token_on() -> None:
    """Log-probabilities of the prompt come ahead of it, over several Deltas."""
    inbox = Inbox(1, 1)
    inbox.interval = 3
    woken = []

    async def run() -> None:
        scored = [Delta(1, 0, [], "", None, 0, None, [row("a")]) for _ in range(2)]
        for delta in (*scored, *(Delta(1, place, [1], "x") for place in range(4))):
            waiting = asyncio.ensure_future(inbox.wait_for_more())
            await asyncio.sleep(0)
            inbox.put(0, delta)
            await asyncio.sleep(0)
            woken.append(waiting.done())
            waiting.cancel()

    asyncio.run(run())
    assert woken[2:] == [True, False, False, True]


def test_an_error_does_not_wait_for_an_interval() -> None:
    async def run() -> None:
        inbox = Inbox(1, 1)
        inbox.interval = 100
        for place in range(2):
            inbox.put(0, Delta(1, place, [1], "x"))
        inbox.take()
        inbox.put(0, Delta(1, 2, [1], "y"))
        waiting = asyncio.ensure_future(inbox.wait())
        await asyncio.sleep(0)
        assert not waiting.done()
        inbox.put(0, GroupFailed("gone"))
        await asyncio.wait_for(waiting, 5)
        assert [each.text for each in inbox.take().values()] == ["y"]


def test_a_request_that_begins_again_leaves_nothing_of_its_first_try() -> None:
    async def run() -> None:
        inbox = Inbox(2, 2)
        first, second = Whole(inbox, 0), Whole(inbox, 1)
        second(Delta(2, 0, [9], "z", End("stop", None, 1, 1), 0))
        first(Delta(1, 0, [1], "a", None, 0))
        first(Delta(1, 0, [1], "b", End("stop", None, 1, 1), 1))
        first.restart()
        assert inbox.open == 3 and set(inbox.pending) == {2}
        first(Delta(1, 0, [1], "c", End("stop", None, 1, 1), 0))
        first(Delta(1, 0, [1], "d", End("stop", None, 1, 1), 1))
        second(Delta(2, 0, [9], "y", End("stop", None, 1, 1), 1))
        await inbox.wait_for_all()
        assert {key: piece.text for key, piece in inbox.take().items()} == {
            0: "c", 1: "d", 2: "z", 3: "y",
        }  # fmt: skip

    asyncio.run(run())
