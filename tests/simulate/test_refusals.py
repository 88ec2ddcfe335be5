"""What `albireo simulate` refuses, and how it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from albireo.cli.main import main

from .test_simulate import write


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give either --trace"),
        (["--arrivals", "often"], "give poisson:RATE or load:SHARE"),
        (["--arrivals", "poisson:0"], "give poisson:RATE or load:SHARE"),
        (["--arrivals", "poisson:1e-300"], "an arrival: at "),
        (["--arrivals", "poisson:1", "--profile", "none"], "there is no profile 'none'"),
        (["--arrivals", "poisson:1", "--profile", "sim:x"], "give sim:MS"),
        (["--arrivals", "poisson:1", "--slo", "ttft"], "is not ttft:MS"),
        (["--arrivals", "poisson:1", "--input-len", "9000"], "the limit is 8192"),
        (["--trace", "/nowhere"], "the trace cannot be read"),
        (["--trace", "/nowhere", "-o", "plot"], "must end in .png, .svg, .pdf"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], reason: str) -> None:
    ended = CliRunner().invoke(main, ["simulate", "--requests", "2", *arguments])
    assert ended.exit_code == 1 and reason in ended.output, ended.output


def test_a_seed_below_0_is_refused() -> None:
    ended = CliRunner().invoke(main, ["simulate", "--arrivals", "poisson:1", "--seed", "-1"])
    assert ended.exit_code == 2 and "-1 is not in the range x>=0" in ended.output


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-num-seqs", "99999999999"),
        ("--max-num-batched-tokens", "9" * 22),
        ("--max-num-queued-reqs", "9" * 10),
        ("--swap-space-tokens", "9" * 22),
        ("--kv-tokens", "9999999999999"),
        ("--max-model-len", "9" * 22),
        ("--input-len", "9" * 12),
        ("--prefixes", "9" * 22),
        ("--block-size", "9" * 22),
    ],
)
def test_numbers_beyond_all_nodes_are_refused(option: str, value: str) -> None:
    words = ["simulate", "--arrivals", "poisson:8", "--requests", "10", option, value]
    ended = CliRunner().invoke(main, words)
    assert ended.exit_code == 2 and f"'{option}': {value} is not in the range" in ended.output


def test_a_prompt_beyond_all_memory_is_one_that_is_too_long(tmp_path: Path) -> None:
    trace = write(tmp_path / "trace", {"at": 0.0, "input_len": 1 << 60, "output_len": 1})
    ended = CliRunner().invoke(main, ["simulate", "--trace", trace])
    assert ended.exit_code == 1 and "the limit is 8192" in ended.output, ended.output


def test_tables_beyond_all_memory_are_said() -> None:
    words = ["simulate", "--arrivals", "poisson:8", "--max-num-seqs", "4096", "--block-size", "1"]
    words += ["--max-model-len", str(1 << 24), "--kv-tokens", str(1 << 28)]
    ended = CliRunner().invoke(main, words)
    assert ended.exit_code == 1 and "Error: Unable to allocate" in ended.output
    assert "lower --max-num-seqs, --max-model-len or --kv-tokens" in ended.output


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"at": 1.0, "output_len": 3}, "0 prompt tokens and 3 new ones"),
        ({"at": 1e300, "input_len": 3, "output_len": 3}, "at 1e+300 s; the latest is 1e+09 s"),
        ({"at": 0.5, "input_len": 3, "output_len": 3}, "is in the order of time"),
        (
            {"at": 1.0, "input_len": 3, "output_len": 3, "top_k": 1},
            "line 2: Object contains unknown",
        ),
        ({"at": 1.0, "input_len": 3, "output_len": 3, "prefix_len": -5}, "`$.prefix_len`"),
        ({"at": 1.0, "output_len": 3, "prompt_ids": [1 << 31]}, "`$.prompt_ids[0]`"),
        ({"at": 1.0, "output_len": 3, "prompt_ids": [-1]}, "`$.prompt_ids[0]`"),
    ],
)
def test_a_damaged_trace_is_refused_with_its_line(
    tmp_path: Path, line: dict[str, Any], reason: str
) -> None:
    trace = write(tmp_path / "trace", {"at": 0.9, "input_len": 3, "output_len": 3}, line)
    ended = CliRunner().invoke(main, ["simulate", "--trace", trace])
    assert ended.exit_code == 1 and "line 2" in ended.output and reason in ended.output
