"""`albireo bench latency` and `albireo bench throughput` on a model that runs anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from albireo.cli.bench import bench


@pytest.fixture
def run(node_home: Path, tiny_model_dir: Path) -> Any:
    """run(command, *words) -> the result, of the tiny model on the CPU."""

    def run(*words: str) -> dict[str, Any]:
        command, *rest = words
        fixed = ["--model", str(tiny_model_dir), "--load-format", "dummy", "--device", "cpu"]
        ended = CliRunner().invoke(bench, [command, *fixed, *rest, "--json"])
        assert ended.exit_code == 0, ended.output
        assert not list((node_home / "run").iterdir())
        return dict(json.loads(ended.stdout))

    return run


@pytest.mark.node
def test_latency(run: Any) -> None:
    result = run(
        "latency", "--batch-size", "4", "--input-len", "8", "--output-len", "12", "--num-iters", "5"
    )
    times = sorted(result["latencies"])
    assert len(times) == 5 and times[0] > 0
    assert result["avg_latency"] == pytest.approx(sum(times) / 5, abs=1e-5)
    assert set(result["percentiles"]) == {"10", "25", "50", "75", "90", "99"}
    assert result["percentiles"]["50"] == times[2]
    assert result["tokens_per_s"] == pytest.approx(4 * 12 / times[2], rel=1e-3)


@pytest.mark.node
def test_throughput_of_batches_above_the_default_limit(run: Any) -> None:
    result = run(
        "throughput", "--batch", "1,20", "--max-num-seqs", "4", "--input-len", "8",
        "--output-len", "8", "--repeats", "2", "--groups", "2x1",
    )  # fmt: skip
    assert [row["batch"] for row in result["results"]] == [1, 20]
    for row in result["results"]:
        assert 0 < row["tokens_per_s_min"] <= row["tokens_per_s"] <= row["tokens_per_s_max"]


@pytest.mark.node
def test_throughput_of_a_data_set(run: Any) -> None:
    result = run(
        "throughput", "--num-prompts", "30", "--max-num-seqs", "4", "--random-input-len", "20",
        "--random-output-len", "5",
    )  # fmt: skip
    assert (result["num_requests"], result["dataset"]) == (30, "random")
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (600, 150)
    assert result["output_tokens_per_second"] == pytest.approx(
        150 / result["elapsed_time"], rel=0.02
    )
    assert result["tokens_per_second"] == pytest.approx(
        5 * result["output_tokens_per_second"], rel=0.01
    )


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["throughput", "--batch", "1,x"], "give sizes of 1 to 4096"),
        (["throughput", "--batch", "0"], "give sizes of 1 to 4096"),
        (["throughput", "--num-prompts", "5", "--dataset-name", "custom"], "needs --dataset-path"),
        (["latency", "--groups", "two"], "expected GROUPSxTP"),
        (["latency", "--model", "/no/such"], "no such file or directory"),
    ],
)
def test_what_is_wrong_is_said(node_home: Path, words: list[str], reason: str) -> None:
    ended = CliRunner().invoke(bench, words)
    assert ended.exit_code == 1 and reason in ended.output
