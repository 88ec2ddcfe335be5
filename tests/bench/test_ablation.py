"""`albireo bench ablation`: what the parts are worth, on devices that run anywhere."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from click.testing import CliRunner

from albireo.bench.ablation import run_round
from albireo.bench.nodes import BenchError
from albireo.bench.streams import Round, TimedStream, run_streams, steps_together
from albireo.cli.bench import bench
from albireo.client import AsyncClient
from albireo.trace.stages import StageStats

from .starved import Starved


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
    result = run("--device", "cpu", "--batch", "2", "--output-len", "400", "--setting", "all on")
    (row,) = result["results"]
    assert result["device"] == "cpu" and row["forward_ms"] > 0
    assert row["exposed_us"]["T4"] > 0 and row["exposed_us"]["T2"] > 0


def streams_of(client: Starved) -> Callable[[], Awaitable[list[TimedStream]]]:
    """Runs three of 20 tokens."""
    return partial(run_streams, cast(AsyncClient, client), random.Random(0), 3, 8, 20, "greedy")


@pytest.mark.parametrize(("starved", "seen", "batches"), [(0, 0, 1), (1, 0, 2), (0, 1, 2)])
def test_streams_that_did_not_decode_together_are_run_again(
    starved: int, seen: int, batches: int
) -> None:
    """Whether they did not at the client or, by the node's timelines, on the node."""
    stats, asked = cast(StageStats, SimpleNamespace(steps=17)), []

    def stages(streams: Sequence[TimedStream]) -> StageStats | None:
        asked.append(streams)
        return stats if len(asked) > seen else None

    found = asyncio.run(run_round(streams_of(Starved(3, starved)), stages))
    assert found == (Round(asked[-1]), stats)
    assert len(asked) == batches and steps_together(found[0]) == 17


@pytest.mark.parametrize(("starved", "steps"), [(9, 17), (0, 7)])
def test_streams_that_never_decode_together(starved: int, steps: int) -> None:
    client = Starved(3, starved)
    with pytest.raises(
        BenchError, match="all 3 streams decoding, 3 times: raise --output-len above 20"
    ):
        stats = cast(StageStats, SimpleNamespace(steps=steps))
        asyncio.run(run_round(streams_of(client), lambda streams: stats))
    assert client.batches == 3


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
