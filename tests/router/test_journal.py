"""The journal: what is read is a prefix of what was written, wherever it is cut or damaged."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from albireo.ipc.messages import Submit
from albireo.router.journal import Journal, JournalError
from albireo.router.records import Accepted, Continued, Opened
from albireo.router.replay import MAX_ENDED, replay
from albireo.router.segments import (
    MAGIC,
    RECORD_HEAD,
    Files,
    Segment,
    mapped,
    payloads,
    segments_in,
)

from .fakes import drop_journal

OPENED = Opened("1", "model", 10, 1000, 128)
SIZE = 64 * 1024 * 3
Tokens = dict[int, list[int]]


def submit(prompt: list[int], max_tokens: int = 50) -> Submit:
    return Submit(
        request=0, prompt_ids=prompt, max_tokens=max_tokens, min_tokens=0, temperature=1.0,
        top_k=0, top_p=1.0, min_p=0.0, seed=-(2**63), stop=("é",), stop_token_ids=(2,),
        include_stop=False, skip_special_tokens=True, logit_bias={3: 1.5},
    )  # fmt: skip


def record(client_id: int, n: int = 1, prompt: int = 3, max_tokens: int = 50) -> Accepted:
    return Accepted(
        0, b"owner", client_id, "t", submit(list(range(prompt)), max_tokens),
        {choice: [] for choice in range(n)},
    )  # fmt: skip


def heavy(client_id: int, max_tokens: int = 50) -> Accepted:
    """With a short prompt, and as much of everything else as a request may have."""
    params = msgspec.structs.replace(
        submit([100_000] * 3, max_tokens),
        stop=("\U0001f600" * 256,) * 16,
        allowed_token_ids=tuple(range(100_000, 104_096)),
        logit_bias=dict.fromkeys(range(100_000, 101_024), 1.5),
        bad_words=(tuple(range(100_000, 100_016)),) * 64,
    )
    return Accepted(0, b"owner", client_id, "\U0001f600" * 64, params, {0: [], 1: []})


def open_journal(path: Path, size: int = SIZE, sync_s: float = 0.0) -> Journal:
    return Journal(path, size, sync_s, OPENED)


def found(path: Path) -> dict[int, Tokens]:
    """Tokens by client's id, as a router would find them now."""
    while True:
        # The journal's thread may delete a file meanwhile; a dead router's does not.
        with contextlib.suppress(FileNotFoundError):
            in_flight, ended = found_in(segments_in(path))
            return in_flight | ended


def found_in(files: list[Path]) -> tuple[dict[int, Tokens], dict[int, Tokens]]:
    """The same of these files, of those in flight and of those that have ended."""
    in_flight, ended = (
        {each.client_id: each.tokens for each in requests}
        for requests in replay([mapped(each) for each in files], OPENED)
    )
    return in_flight, ended


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "j"


def size_of(path: Path) -> int:
    """Bytes of all files there; the journal's thread may delete one meanwhile."""
    size = 0
    for each in segments_in(path):
        with contextlib.suppress(FileNotFoundError):
            size += each.stat().st_size
    return size


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


class _Killed(BaseException):
    pass


def killed_start(path: Path, steps: int) -> bool:
    """A router that dies when its start has done so many things to the files; False when that is
    all of them."""
    left = steps

    def counted(do: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal left
            if not left:
                raise _Killed
            left -= 1
            return do(*args)

        return call

    journal = Journal.__new__(Journal)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("__init__", "append", "void", "make_first", "sync"):
            patch.setattr(Segment, name, counted(getattr(Segment, name)))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        patch.setattr(Files, "start", lambda *_: None)  # its thread counts for nothing
        try:
            Journal.__init__(journal, path, SIZE, 1.0, OPENED)
        except _Killed:
            return True
        finally:
            os.close(journal._lock)
    return False


@pytest.mark.parametrize("last", ["a step", "the end of a file"])
def test_a_router_that_dies_while_it_starts(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """The older file has a request that is nowhere else, and one that was given up since."""
    monkeypatch.setattr("albireo.router.journal._COPY_BYTES", 0)
    journal = open_journal(path)
    ended, *others = (record(number, prompt=1500) for number in range(5))
    one, gone, *_ = others
    for each in (ended, *others):
        assert journal.accept(each)
    journal.ended(ended.number)
    journal.forget(ended, gone=False)
    while not journal._older:
        journal.step([(99, 0, [7] * 20)])
    journal.forget(gone, gone=True)
    one.tokens[0] += [5, 6]
    journal.step([(one.number, 0, [5, 6])])
    if last == "the end of a file":
        journal._newer.append(bytearray(msgspec.msgpack.encode(Continued())))
    drop_journal(journal)
    expected = {1: {0: [5, 6]}, 3: {0: []}, 4: {0: []}}, {0: {0: []}}
    older, newer = segments_in(path)
    assert found_in([older, newer]) == expected
    assert 2 in found_in([older])[0] and not {2, 4} & found_in([newer])[0].keys()
    for steps in range(100):
        there = tmp_path / str(steps)
        shutil.copytree(path, there)
        killed = killed_start(there, steps)
        assert found_in(segments_in(there)) == expected, steps
        if not killed:
            break
        assert not killed_start(there, 100)
        (only,) = segments_in(there)
        assert found_in([only]) == expected
    assert steps > 10


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


# ---------------------------------------------------------------------- damage
PAYLOADS = st.lists(st.binary(min_size=1, max_size=40), max_size=12)
_quick = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def written(directory: Path, contents: list[bytes]) -> bytes:
    for old in segments_in(directory):
        old.unlink()
    segment = Segment(directory, 1, 4096)
    for each in contents:
        segment.append(bytearray(each))
    data = segment.path.read_bytes()
    segment.remove()
    return data


@_quick
@given(PAYLOADS, st.data())
def test_any_damage_leaves_a_prefix(tmp_path: Path, contents: list[bytes], data: Any) -> None:
    whole = written(tmp_path, contents)
    assert list(payloads(whole)) == contents
    cut = data.draw(st.integers(0, len(whole)))
    assert list(payloads(whole[:cut])) == contents[: len(list(payloads(whole[:cut])))]
    used = len(MAGIC) + sum(RECORD_HEAD.size + len(each) for each in contents)
    at, flip = data.draw(st.integers(0, used - 1)), data.draw(st.integers(1, 255))
    damaged = bytearray(whole)
    damaged[at] ^= flip
    read = list(payloads(bytes(damaged)))
    assert read == contents[: len(read)] and (len(read) < len(contents) or not contents)


@_quick
@given(st.binary(max_size=200))
def test_random_bytes_are_no_records(noise: bytes) -> None:
    assert list(payloads(noise)) == []
    assert replay([MAGIC + noise], OPENED) == ([], [])


class Machine(RuleBasedStateMachine):
    """A journal against a plain dictionary, with deaths at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self._home = tempfile.TemporaryDirectory(prefix="alj")
        self.path = Path(self._home.name)
        self.journal = open_journal(self.path, 3 * 40_960)
        self.live: dict[int, Accepted] = {}
        self.next = 1

    @rule(n=st.integers(1, 3), prompt=st.integers(1, 900))
    def accept(self, n: int, prompt: int) -> None:
        new = record(self.next, n, prompt, 60)
        self.next += 1
        if self.journal.accept(new):
            self.live[new.client_id] = new

    @precondition(lambda self: self.live)
    @rule(data=st.data(), ids=st.lists(st.integers(0, 999), max_size=5))
    def tokens(self, data: Any, ids: list[int]) -> None:
        each = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        choice = data.draw(st.sampled_from(sorted(each.tokens)))
        each.tokens[choice] += ids
        self.journal.step([(each.number + choice, len(each.tokens[choice]) - len(ids), ids)])

    @precondition(lambda self: self.live)
    @rule(data=st.data(), gone=st.booleans())
    def forget(self, data: Any, gone: bool) -> None:
        each = self.live.pop(data.draw(st.sampled_from(sorted(self.live))))
        if not gone:
            for choice in each.tokens:
                self.journal.ended(each.number + choice)
        self.journal.forget(each, gone=gone)

    @rule()
    def die(self) -> None:
        drop_journal(self.journal)
        self.journal = open_journal(self.path, 3 * 40_960)
        there = {each.client_id: each for each in self.journal.found}
        for number, each in self.live.items():
            assert there[number].tokens == each.tokens and there[number].submit == each.submit
        for number, each in there.items():
            if number not in self.live:
                self.journal.forget(each, gone=True)
            else:
                assert each.number
                self.live[number] = each
        assert not {each.client_id for each in self.journal.found_ended} & self.live.keys()

    @invariant()
    def bounded(self) -> None:
        assert size_of(self.path) <= 3 * 40_960 and not self.journal._off

    def teardown(self) -> None:
        drop_journal(self.journal)
        self._home.cleanup()


Machine.TestCase.settings = settings(max_examples=15, stateful_step_count=40, deadline=None)
test_any_life = Machine.TestCase
