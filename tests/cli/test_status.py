"""The table of `albireo node status` that says where a step's time goes."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from albireo.cli.status import _stages


def test_every_task_has_its_mean_its_p99_and_what_is_exposed() -> None:
    tasks = {
        name: {"mean_us": i + 0.5, "p99_us": 10.0 * i, "exposed_us": 1.0}
        for i, name in enumerate(("schedule", "input", "forward", "sample", "output"))
    }
    stages: dict[str, Any] = {
        "serial_fraction": 0.1, "step_us_mean": 1234.0, "step_us_p99": 2000.0,
        "idle_us_mean": 7.5, "idle_us_p99": 11.0, **tasks,
    }  # fmt: skip
    out = io.StringIO()
    table = _stages([{"group": 0, "stages": stages}, {"group": 1, "stages": None}])
    Console(file=out, width=120).print(table)
    head, mean, p99, exposed, silent = (line.split() for line in out.getvalue().splitlines())
    assert head == ["group", "serial", "us", "step", "idle", "T1", "T2", "T3", "T4", "T5"]
    assert mean == ["0", "10.00%", "mean", "1,234.0", "7.5", "0.5", "1.5", "2.5", "3.5", "4.5"]
    assert p99 == ["P99", "2,000.0", "11.0", "0.0", "10.0", "20.0", "30.0", "40.0"]
    assert exposed == ["exposed", *["1.0"] * 5]
    assert silent == ["1", *"-" * 9]
