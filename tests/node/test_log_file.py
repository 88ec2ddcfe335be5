"""The log of a node has a bound, whoever writes it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from albireo.node import log_file


@pytest.fixture
def log(node_home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Path]:
    monkeypatch.setattr(log_file, "MAX_LOG_BYTES", 1000)
    fd = log_file.open_log("a")
    return fd, node_home / "state" / "a.log"


def test_what_is_too_long_becomes_the_old_log_and_writers_go_on(log: tuple[int, Path]) -> None:
    fd, path = log
    child = os.dup(fd)
    for number in range(100):
        os.write(child if number % 2 else fd, b"%03d of many lines\n" % number)
        log_file.bound(path)
    old = path.with_suffix(".log.1")
    assert path.stat().st_size <= 1000 and old.stat().st_size <= 1000
    assert path.read_bytes().endswith(b"099 of many lines\n")
    assert not path.read_bytes().startswith(b"\0")
    # Old and new follow each other without a gap.
    lines = (old.read_bytes() + path.read_bytes()).splitlines()
    numbers = [int(line[:3]) for line in lines if len(line) == 17]
    assert numbers == list(range(numbers[0], 100)) and len(numbers) > 50
    assert all(stat.S_IMODE(each.stat().st_mode) == 0o600 for each in (path, old))


def test_a_log_that_is_short_enough_is_left_alone(log: tuple[int, Path]) -> None:
    fd, path = log
    os.write(fd, b"x" * 1000)
    log_file.bound(path)
    assert path.stat().st_size == 1000 and not path.with_suffix(".log.1").exists()


def test_where_nothing_can_be_kept_it_is_emptied_all_the_same(log: tuple[int, Path]) -> None:
    fd, path = log
    path.with_suffix(".log.1").mkdir()
    os.write(fd, b"x" * 2000)
    log_file.bound(path)
    assert path.stat().st_size == 0
