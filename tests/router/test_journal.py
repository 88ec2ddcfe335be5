"""The journal: what is in flight is in it, its size is bounded, and who is gone stays gone."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import msgspec
import pytest

from albireo.router.journal import Journal, JournalError
from albireo.router.records import Accepted, Opened
from albireo.router.replay import MAX_ENDED
from albireo.router.segments import Segment, segments_in

from .fakes import drop_journal
from .journals import SIZE, found, heavy, open_journal, record, size_of, submit


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "j"


def test_what_was_in_flight_comes_back(path: Path) -> None:
    journal = open_journal(path)
    one, two = record(1), record(2, n=2)
    assert journal.accept(one) and journal.accept(two)
    journal.step([(one.number, 0, [5]), (two.number, 0, [6]), (two.number + 1, 0, [7, 8])])
    journal.step([(one.number, 1, [9])])
    drop_journal(journal)
    again = open_journal(path)
    assert [(each.client_id, each.tokens) for each in again.found] == [
        (1, {0: [5, 9]}),
        (2, {0: [6], 1: [7, 8]}),
    ]
    assert again.found[0].submit == one.submit
    assert again.found[0].owner == b"owner"
    drop_journal(again)
    assert found(path) == {1: {0: [5, 9]}, 2: {0: [6], 1: [7, 8]}}


def test_a_second_death_finds_the_same(path: Path) -> None:
    journal = open_journal(path)
    one = record(1)
    journal.accept(one)
    for index in range(5):
        journal.step([(one.number, index, [index])])
        drop_journal(journal)
        journal = open_journal(path)
        (one,) = journal.found
        assert one.tokens[0] == list(range(index + 1))
    drop_journal(journal)


def test_nothing_is_left_when_nothing_is_in_flight(path: Path) -> None:
    journal = open_journal(path)
    one = record(1)
    journal.accept(one)
    journal.ended(one.number)
    journal.forget(one, gone=False)
    journal.close()
    assert list(path.iterdir()) == []


def test_what_had_ended_under_the_router_before_keeps_no_file(path: Path) -> None:
    journal = open_journal(path)
    one, two = record(1, n=2), record(2)
    for each in (one, two):
        assert journal.accept(each)
    journal.step([(one.number, 0, [5]), (one.number + 1, 0, [6]), (two.number, 0, [7])])
    for number in (one.number, one.number + 1):
        journal.ended(number)
    journal.forget(one, gone=False)
    journal.step([])
    for _ in range(2):
        drop_journal(journal)
        assert found(path) == {1: {0: [5], 1: [6]}, 2: {0: [7]}}
        journal = open_journal(path)
        assert [each.client_id for each in journal.found] == [2]
        assert [each.client_id for each in journal.found_ended] == [1]
    journal.forget(journal.found[0], gone=True)
    journal.close()
    assert list(path.iterdir()) == []


def test_who_was_given_up_does_not_come_back_and_who_has_ended_does(path: Path) -> None:
    journal = open_journal(path, 1 << 22)
    gone, ended = record(1), record(2)
    for each in (gone, ended):
        journal.accept(each)
    journal.step([(gone.number, 0, [5]), (ended.number, 0, [6])])
    journal.forget(gone, gone=True)
    journal.ended(ended.number)
    journal.forget(ended, gone=False)
    for number in range(MAX_ENDED):
        many = record(100 + number)
        journal.accept(many)
        if number == MAX_ENDED - 1:
            assert 2 in found(path)
        journal.ended(many.number)
        journal.forget(many, gone=False)
        journal.step([])
    drop_journal(journal)
    assert 1 not in found(path) and 2 not in found(path)
    assert len(found(path)) == MAX_ENDED


def test_what_has_ended_and_is_given_up_then_does_not_come_back(path: Path) -> None:
    journal = open_journal(path)
    one = record(1)
    journal.accept(one)
    journal.step([(one.number, 0, [5])])
    journal.ended(one.number)
    journal.forget(one, gone=False)
    journal.step([])
    assert found(path) == {1: {0: [5]}}
    journal.forget(one, gone=True)
    journal.step([])
    drop_journal(journal)
    assert found(path) == {}


@pytest.mark.parametrize("sync_s", [0.0, 0.01])
def test_its_size_is_bounded_and_nothing_in_flight_is_lost(path: Path, sync_s: float) -> None:
    """Several times its size goes through it."""
    journal = open_journal(path, sync_s=sync_s)
    long = [record(number, prompt=500, max_tokens=400) for number in range(2)]
    for each in long:
        assert journal.accept(each)
    expected = {each.client_id: each.tokens for each in long}
    for step in range(400):
        for each in long:
            each.tokens[0].append(step)
        journal.step([(each.number, step, [step]) for each in long])
        brief = record(1000 + step, prompt=800, max_tokens=1)
        assert journal.accept(brief)
        journal.ended(brief.number)
        journal.forget(brief, gone=False)
        assert size_of(path) <= SIZE
        if step % 37 == 0:
            there = found(path)
            assert {number: there[number] for number in expected} == expected
    assert int(segments_in(path)[-1].stem) > 8
    drop_journal(journal)


def test_a_full_journal_takes_no_more_and_says_so(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = open_journal(path)
    records = [record(number, max_tokens=2000) for number in range(5)]
    with caplog.at_level(logging.WARNING):
        assert [journal.accept(each) for each in records] == [True] * 3 + [False] * 2
    assert caplog.text.count("--journal-max-mib") == 1
    assert records[3].number == 0
    journal.forget(records[3], gone=True)
    journal.forget(records[0], gone=True)
    assert journal.accept(records[4])
    drop_journal(journal)


def test_all_of_a_request_has_room(path: Path) -> None:
    """What is in flight grows as long as it may, and is written anew, many times."""
    size = 16 << 20
    journal = open_journal(path, size)
    in_flight: list[Accepted] = []
    while journal.accept(new := heavy(len(in_flight), max_tokens=500)):
        in_flight.append(new)
    # The tokens that are to come have their room, and without them they fill the half of a file.
    assert 3 * size // 32 < len(in_flight) * len(msgspec.msgpack.encode(new)) <= size // 6
    for index in range(500):
        tokens = []
        for each in in_flight:
            for choice, ids in each.tokens.items():
                ids.append(100_000 + index)
                tokens.append((each.number + choice, index, ids[-1:]))
        journal.step(tokens)
        journal.step([(0, 0, [100_000] * 5000)])  # others'
        assert size_of(path) <= size
    assert int(segments_in(path)[-1].stem) > 4
    drop_journal(journal)
    assert found(path) == {each.client_id: each.tokens for each in in_flight}


def test_a_file_that_fills_up_while_another_is_emptied(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Much comes and ends at once, and little is written anew with each step."""
    monkeypatch.setattr("albireo.router.journal._COPY_BYTES", 0)
    journal = open_journal(path, 4 * SIZE)

    def of_length(client_id: int, prompt: int) -> Accepted:
        return Accepted(0, b"owner", client_id, "", submit([100_000] * prompt, 1), {0: []})

    in_flight = [of_length(number, 1000) for number in range(10)]
    assert all(journal.accept(each) for each in in_flight)
    for number in range(100):
        brief = of_length(100 + number, 4000 + 10 * number)
        assert journal.accept(brief)
        journal.forget(brief, gone=True)
        journal.step([])
        assert size_of(path) <= 4 * SIZE
        assert found(path).keys() == set(range(10))
    for each in in_flight:
        journal.forget(each, gone=True)
    journal.close()
    assert list(path.iterdir()) == []


TOO_LONG = [(99, 0, [300] * 30_000)]
"""Tokens that no segment can hold."""


def full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Journal, Accepted]:
    """A journal of two files, with one of two requests still to be written anew, which gets no
    third file; and the first of these requests."""
    monkeypatch.setattr("albireo.router.journal._COPY_BYTES", 0)
    journal = open_journal(path)
    one, two = record(1, prompt=1500), record(2, prompt=1500)
    assert journal.accept(one) and journal.accept(two)
    while not journal._older:
        journal.step([(99, 0, [7] * 20)])

    def fail() -> Segment:
        raise OSError("no space left on device")

    monkeypatch.setattr(journal._files, "take", fail)
    return journal, one


def test_a_disk_that_is_full_ends_the_journal_and_not_the_router(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, one = full_disk(path, monkeypatch)
    journal.step(TOO_LONG)
    assert "no space left" in caplog.text and not journal.accept(record(8))
    assert caplog.text.count("cannot be written") == 1
    journal.step([(one.number, 0, [5])])
    drop_journal(journal)
    assert {1, 2} <= set(found(path)), "what was not written anew must not be deleted"


def test_a_record_that_no_file_can_hold_ends_the_journal_and_deletes_nothing(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A group that sends more than was asked for."""
    journal = open_journal(path)
    one, two = record(1), record(2)
    assert journal.accept(one) and journal.accept(two)
    two.tokens[0] += [300] * 30_000
    journal.step([(two.number, 0, two.tokens[0])])
    assert caplog.text.count("cannot be written") == 1 and "65536 bytes" in caplog.text
    late = record(3)
    assert not journal.accept(late)
    assert found(path).keys() == {1, 2}
    journal.forget(one, gone=True)
    journal.step([])
    assert found(path) == {}
    journal.forget(two, gone=False)
    journal.close()
    assert list(path.iterdir()) == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_journal_that_cannot_note_who_is_gone_brings_nobody_back(
    path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Their clients may have other tokens since than those that are there."""
    journal, one = full_disk(path, monkeypatch)
    if when == "after":
        journal.step(TOO_LONG)
        assert {1, 2} <= set(found(path))
    journal.forget(one, gone=True)
    journal.step(TOO_LONG)
    drop_journal(journal)
    assert found(path) == {}
    again = open_journal(path)
    assert again.accept(record(3))
    drop_journal(again)
    assert set(found(path)) == {3}


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_router_that_is_restarted_on_a_full_disk_serves(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, goes_on: bool
) -> None:
    """What was in flight can go on; who might have other tokens then does not come back again."""
    journal = open_journal(path)
    one = record(1)
    assert journal.accept(one)
    one.tokens[0] += [5, 6]
    journal.step([(one.number, 0, [5, 6])])
    drop_journal(journal)
    no_space(monkeypatch)
    with pytest.raises(JournalError, match="No space left"):  # the first router of a node
        open_journal(path.with_name("another"))
    journal = open_journal(path, restarted=True)
    assert [each.tokens for each in journal.found] == [{0: [5, 6]}]
    assert caplog.text.count("cannot be written") == 1 and not journal.accept(record(2))
    journal.step([(7, 0, [1])])
    assert found(path) == {1: {0: [5, 6]}}
    if goes_on:
        journal.forget(journal.found[0], gone=True)
        journal.step([])
        assert list(path.iterdir()) == []
    journal.close()
    assert (found(path) == {}) == goes_on


def test_where_nothing_was_in_flight_a_full_disk_has_no_file_left(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop_journal(open_journal(path))
    no_space(monkeypatch)
    journal = open_journal(path, restarted=True)
    assert list(path.iterdir()) == [] and not journal.accept(record(1))
    journal.step([])
    journal.close()


def no_space(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*where: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)


def test_one_router_at_a_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("albireo.router.journal._LOCK_S", 0.05)
    journal = open_journal(path)
    with pytest.raises(JournalError, match="another node"):
        open_journal(path)
    journal.close()
    open_journal(path).close()


def test_a_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="--journal"):
        open_journal(tmp_path / "file" / "j")


def test_another_model_s_requests_are_not_taken(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = open_journal(path)
    journal.accept(record(1))
    drop_journal(journal)
    other = Journal(path, SIZE, 0.0, Opened("1", "other", 10, 1000, 128))
    assert other.found == [] and "another model" in caplog.text
    other.close()


def test_it_is_the_owner_s_alone(path: Path) -> None:
    journal = open_journal(path, sync_s=0.01)
    journal.accept(record(1))
    assert path.stat().st_mode & 0o777 == 0o700
    assert all(each.stat().st_mode & 0o777 == 0o600 for each in segments_in(path))
    drop_journal(journal)
