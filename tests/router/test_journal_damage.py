"""A journal's files, cut or damaged anywhere, and routers that die at any moment: what is read is a
prefix of what was written."""

from __future__ import annotations

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

from albireo.router.journal import Journal
from albireo.router.records import Accepted, Continued
from albireo.router.replay import replay
from albireo.router.segments import MAGIC, RECORD_HEAD, Files, Segment, payloads, segments_in

from .fakes import drop_journal
from .journals import OPENED, SIZE, found_in, open_journal, record, size_of

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


# ---------------------------------------------------------------------- a death at the start
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """The older file has a request that is nowhere else, and one that was given up since."""
    monkeypatch.setattr("albireo.router.journal._COPY_BYTES", 0)
    path = tmp_path / "j"
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
