"""`albireo bench step` on a shape that runs anywhere, and the shapes it knows."""

from __future__ import annotations

import asyncio
import gc
import json
import random
from pathlib import Path

import pytest
from click.testing import CliRunner

from albireo.bench.device_steps import DeviceTimes
from albireo.bench.disturbance import Moment, Watcher
from albireo.bench.nodes import BenchError
from albireo.bench.shapes import SHAPES, write_model
from albireo.bench.step import _add_floor, bench_step, run_round
from albireo.bench.streams import steady, steps_together
from albireo.cli.bench import bench
from albireo.node.options import NodeOptions
from albireo.workers.models.load import read_config
from albireo.workers.tokenizer.text_model import load_text_model

from .starved import Starved

BILLIONS = {"qwen3-0.6b": 0.596, "qwen3-8b": 8.19, "llama-3.1-8b": 8.03, "qwen2.5-32b": 32.76}
BILLIONS |= {"qwen3-30b-a3b": 30.53, "gemma-3-4b": 3.88, "gemma-3-27b": 27.01, "phi-3-mini": 3.82}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, tmp_path: Path) -> None:
    write_model(shape, tmp_path)
    config = read_config(tmp_path)
    if shape in BILLIONS:
        assert config.num_params() / 1e9 == pytest.approx(BILLIONS[shape], rel=0.005)
    assert 2 in config.tp_degrees()
    text = load_text_model(str(tmp_path))
    assert text.decode(text.encode("any bytes: é", False), False) == "any bytes: é"
    assert text.token_bytes is not None


BFLOAT16 = {"dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "e4m7_weights": "off"}


def test_the_floor_is_that_of_the_feasibility_study(tmp_path: Path) -> None:
    """At 3.0 TB/s and a context of 320: 5.06 ms for one sequence, 9.07 for 256."""
    write_model("qwen3-8b", tmp_path)
    config = read_config(tmp_path)
    for batch, floor_ms in ((1, 5.06), (256, 9.07)):
        row = {"batch": batch, "step_ms_median": 10.0}
        _add_floor(row, config, 1, BFLOAT16, 320, 3.0e12, {})
        assert row["floor_ms"] == pytest.approx(floor_ms, rel=0.01)
        assert row["ratio"] == pytest.approx(10 / floor_ms, rel=0.01)


def test_the_floor_of_weights_of_12_bits(tmp_path: Path) -> None:
    """A quarter less of the linear layers and the head; norms stay."""
    write_model("qwen3-8b", tmp_path)
    config = read_config(tmp_path)
    row = {"batch": 1, "step_ms_median": 10.0}
    _add_floor(row, config, 2, BFLOAT16 | {"e4m7_weights": "beside"}, 320, 3.0e12, {})
    assert config.e4m7_params(2) == pytest.approx(7.568e9, rel=1e-3)
    assert row["weights_gb"] == pytest.approx(1.5 * 7.568 / 2, rel=1e-3)


def test_the_floor_of_a_kv_cache_of_12_bits(tmp_path: Path) -> None:
    write_model("qwen3-8b", tmp_path)
    config = read_config(tmp_path)
    row = {"batch": 256, "step_ms_median": 10.0}
    _add_floor(row, config, 1, BFLOAT16 | {"kv_cache_dtype": "e4m7"}, 320, 3.0e12, {})
    assert row["kv_gb"] == pytest.approx(256 * 320 * 36 * 8 * (3 * 128 + 4) / 1e9, abs=1e-3)


def test_the_floor_has_the_all_reduces_of_several_ranks(tmp_path: Path) -> None:
    """73 sums for 36 layers; 128 rows of 4,096 in bfloat16 are 1 MiB, 192 lie between two sizes."""
    write_model("qwen3-8b", tmp_path)
    config = read_config(tmp_path)
    sums_us = {1 << 20: 10.0, 2 << 20: 14.0, 4 << 20: 23.0}
    for batch, tp, us in ((128, 2, 10.0), (192, 2, 12.0), (1, 2, 10.0), (128, 1, 0.0)):
        row = {"batch": batch, "step_ms_median": 10.0}
        _add_floor(row, config, tp, BFLOAT16, 320, 3.0e12, sums_us)
        assert row["all_reduce_ms"] == pytest.approx(73 * us / 1e3)
        moved_ms = (row["weights_gb"] + row["kv_gb"]) / 3.0e3 * 1e3
        assert row["floor_ms"] == pytest.approx(moved_ms + row["all_reduce_ms"], abs=2e-3)


def test_the_floor_counts_the_experts_that_are_picked(tmp_path: Path) -> None:
    """Of 30.5 billion weights 3.0 for one sequence; nearly all for 256. The rest is no floor."""
    write_model("qwen3-30b-a3b", tmp_path)
    config = read_config(tmp_path)
    for batch, billions in ((1, 3.04), (256, 30.2)):
        row = {"batch": batch, "step_ms_median": 10.0}
        _add_floor(row, config, 1, BFLOAT16, 320, 3.0e12, {})
        assert row["weights_gb"] == pytest.approx(2 * billions, rel=0.01)


class Device:
    """Stands in for DeviceSteps."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, int]] = []

    def before(self, end: float, count: int) -> DeviceTimes:
        self.asked.append((end, count))
        return DeviceTimes([0.01], [0.0])


@pytest.mark.parametrize(("starved", "batches", "steps"), [(0, 1, 17), (1, 2, 17), (9, 3, 0)])
def test_a_round_that_the_client_missed_is_run_again(
    starved: int, batches: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(Watcher):
        def slow_moments(self) -> list[Moment]:
            return [*super().slow_moments(), moment]

    moment, device = Moment(0.0, 1.0, 9.0), Device()
    monkeypatch.setattr("albireo.bench.step.Watcher", Slow)
    client = Starved(3, starved)
    found = asyncio.run(run_round(client, random.Random(0), 3, 8, 20, "greedy", device))  # type: ignore[arg-type]
    assert client.batches == batches
    assert steps_together(found) == steps
    assert not client.collects and gc.isenabled()
    assert moment in found.slow
    assert found.device == DeviceTimes([0.01], [0.0])
    assert device.asked == [(steady(found.streams)[1], steps)]


PROCESSES = {"client", "supervisor", "router", "tokenizer", "forkserver", "understudy", "janitor"}
PROCESSES |= {"g0.scheduler", "g0.worker0", "g0.detokenizer"}


@pytest.mark.node
@pytest.mark.parametrize("sampling", ["greedy", "full"])
def test_through_a_real_node(sampling: str, node_home: Path) -> None:
    arguments = ["step", "--shape", "tiny", "--device", "cpu", "--batch", "1,3", "--input-len", "8"]
    # Enough for all to decode together where the client has to wait for a core.
    arguments += ["--output-len", "240", "--sampling", sampling, "--json", "--rounds", "2"]
    ended = CliRunner().invoke(bench, arguments)
    assert ended.exit_code == 0, ended.output
    result = json.loads(ended.output)
    assert [row["batch"] for row in result["results"]] == [1, 3]
    assert result["sampling"]["name"] == sampling and result["no_room"] == []
    for row in result["results"]:
        assert row["steps"] >= 16 and len(row["p99_ms_of_rounds"]) == 2
        assert 0 < row["step_ms_median"] <= row["step_ms_p99"]
        assert row["ratio"] > 0
        assert 0 < row["device_ms_median"] <= row["device_ms_p99"]
        assert 0 <= row["device_idle_ms_p99"] <= row["device_ms_p99"]
        assert row["slowdown_max"] >= 1 and row["stolen_ms"] >= 0
        waits = row["core_waits_ms"]
        assert set(waits) <= PROCESSES and all(ms > 0 for ms in waits.values())


@pytest.mark.node
def test_batches_that_the_cache_cannot_hold_are_told(node_home: Path) -> None:
    """1 MiB is 256 blocks of 16 tokens; a stream of 150 needs 10."""
    options = NodeOptions(device="cpu", dtype="bfloat16", kv_cache_gib=1 / 1024)
    result = bench_step("tiny", options, [1, 26], 8, 142, "greedy")
    assert [row["batch"] for row in result["results"]] == [1]
    (left_out,) = result["no_room"]
    assert left_out["batch"] == 26
    assert (
        "26 streams of 150 tokens need 260 KV blocks of 16 tokens, and the group has 256: "
        in (left_out["reason"])
    )
    with pytest.raises(BenchError, match="27 streams of 150 tokens need 270 KV blocks"):
        bench_step("tiny", options, [27], 8, 142, "greedy")


@pytest.mark.parametrize(
    ("words", "reason"),
    [(["--groups", "2x1"], "give 1xT"), (["--batch", "1,x"], "give sizes of 1 to 4096")],
)
def test_what_is_wrong_is_said(words: list[str], reason: str, node_home: Path) -> None:
    ended = CliRunner().invoke(bench, ["step", "--shape", "tiny", *words])
    assert ended.exit_code == 1
    assert reason in ended.output
