"""`albireo bench ablation`: what the parts are worth, on devices that run anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from albireo.cli.bench import bench


def run(*words: str) -> dict[str, Any]:
    ended = CliRunner().invoke(
        bench,
        [
            "ablation",
            "--shape",
            "tiny",
            "--sampling",
            "greedy",
            "--input-len",
            "8",
            "--json",
            *words,
        ],
    )
    assert ended.exit_code == 0, ended.output
    return dict(json.loads(ended.stdout))


@pytest.mark.node
def test_planning_ahead_is_worth_the_round_trip(node_home: Path) -> None:
    result = run(
        "--device", "sim", "--sim-step-ms", "10", "--batch", "8", "--output-len", "80",
        "--setting", "all on", "--setting", "--no-async-scheduling",
    )  # fmt: skip
    on, off = result["results"]
    assert (on["setting"], off["setting"]) == ("all on", "--no-async-scheduling")
    assert on["step_ms_median"] == 10.0 and on["planned_ahead"] > 0.9
    assert off["planned_ahead"] == 0 and off["step_ms_median"] > 10.02
    # The device waits for the scheduler.
    assert off["exposed_us"]["T1"] > on["exposed_us"]["T1"]
    for row in result["results"]:
        assert row["steps"] > 60
        assert sum(row["exposed_us"].values()) == pytest.approx(row["idle_us"], abs=1)
        assert row["serial_fraction"] == pytest.approx(1 - 10 / row["step_ms"], abs=1e-3)


@pytest.mark.node
def test_on_a_model(node_home: Path) -> None:
    result = run("--device", "cpu", "--batch", "2", "--output-len", "200", "--setting", "all on")
    (row,) = result["results"]
    assert result["device"] == "cpu" and row["forward_ms"] > 0
    assert row["exposed_us"]["T4"] > 0 and row["exposed_us"]["T2"] > 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--setting", "all"], "not one of all on, --no-async"),
        (["--groups", "2x1"], "give 1xT"),
        (["--model", "demo"], "give one of them"),
    ],
)
def test_what_is_wrong_is_said(words: list[str], reason: str) -> None:
    ended = CliRunner().invoke(bench, ["ablation", "--shape", "tiny", *words])
    assert ended.exit_code == 1 and reason in ended.output
