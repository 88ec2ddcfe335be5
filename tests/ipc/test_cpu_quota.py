"""Cores of a process in a cgroup with a quota."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from albireo.ipc.cpu_quota import usable_cores


def cgroups(tmp_path: Path, own: str, **quotas: str) -> tuple[Path, Path]:
    root = tmp_path / "cgroup"
    for name, quota in quotas.items():
        group = root / name.replace("__", "/")
        group.mkdir(parents=True, exist_ok=True)
        (group / "cpu.max").write_text(quota + "\n")
    (tmp_path / "own").write_text(own)
    return root, tmp_path / "own"


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("400000 100000", 4), ("250000 100000", 3), ("1000 100000", 1)],
)
def test_the_quota_bounds_them(tmp_path: Path, quota: str, cores: int) -> None:
    assert usable_cores(*cgroups(tmp_path, "0::/node\n", node=quota)) == cores


def test_that_of_a_group_above_counts_too(tmp_path: Path) -> None:
    made = cgroups(tmp_path, "0::/pod/node\n", pod="200000 100000", pod__node="max 100000")
    assert usable_cores(*made) == 2


@pytest.mark.parametrize("own", ["", "3:cpu:/node\n", "0::/\n", "0::/gone\n"])
def test_without_one_the_affinity_counts(tmp_path: Path, own: str) -> None:
    assert usable_cores(*cgroups(tmp_path, own)) == 8


def test_without_proc(tmp_path: Path) -> None:
    assert usable_cores(tmp_path, tmp_path / "none") == 8
