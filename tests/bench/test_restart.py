"""`albireo bench restart` on a node whose worker really dies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from albireo.cli.bench import bench


@pytest.mark.node
def test_through_a_real_node(node_home: Path) -> None:
    arguments = ["restart", "--shape", "tiny", "--device", "cpu", "--streams", "3", "--json"]
    ended = CliRunner().invoke(bench, arguments)
    assert ended.exit_code == 0, ended.output
    result = json.loads(ended.stdout)
    assert (result["model"], result["device"], result["streams"]) == ("tiny", "cpu", 3)
    (ready_s,), (pause_s,) = result["ready_s"], result["pause_s"]
    assert 0 < ready_s <= pause_s
    (workers,) = result["workers_phases_s"]
    assert list(workers) == ["g0.worker0"]
    assert 0 < sum(workers["g0.worker0"].values()) < ready_s


@pytest.mark.parametrize(
    ("words", "reason"),
    [(["--groups", "2x1"], "give 1xT"), (["--model", "demo"], "give one of them")],
)
def test_what_is_wrong_is_said(words: list[str], reason: str) -> None:
    ended = CliRunner().invoke(bench, ["restart", "--shape", "tiny", *words])
    assert ended.exit_code == 1 and reason in ended.output
