"""`albireo bench prefill` on a shape that runs anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from albireo.bench.prefill import _products
from albireo.bench.shapes import write_model
from albireo.cli.bench import bench
from albireo.workers.models.load import read_config


@pytest.mark.node
def test_through_a_real_node(node_home: Path) -> None:
    arguments = ["prefill", "--shape", "tiny", "--device", "cpu", "--prompts", "2x64,1x128"]
    ended = CliRunner().invoke(bench, [*arguments, "--mixed", "4x64", "--json"])
    assert ended.exit_code == 0, ended.output
    result = json.loads(ended.stdout)
    assert [(row["prompts"], row["tokens"]) for row in result["prompts"]] == [(2, 64), (1, 128)]
    for row in result["prompts"]:
        tokens = row["prompts"] * row["tokens"]
        assert row["tokens_per_s"] == pytest.approx(tokens / row["ms"] * 1e3, rel=0.01)
        assert row["ratio"] > 1, "faster than its matrix products"
        assert row["ratio"] == pytest.approx(
            row["floor_tokens_per_s"] / row["tokens_per_s"], rel=0.05
        )
    mixed = result["mixed"]
    assert mixed["samples"] > 0 and mixed["mixed_step_ms"] > mixed["decode_step_ms"]


def test_the_products_are_those_of_the_layers(tmp_path: Path) -> None:
    """Qwen3-8B: 36 layers of qkv 4096 x 6144, o 4096 x 4096, and 3 x 4096 x 12288."""
    write_model("qwen3-8b", tmp_path)
    qkv, rest = 4096 * 6144, 4096 * (4096 + 3 * 12288)
    found = _products(read_config(tmp_path), 2, 1000)
    assert found == 1000 * (36 * qkv + 35 * rest) + 2 * rest


def test_a_token_meets_only_the_experts_that_are_picked_for_it(tmp_path: Path) -> None:
    """Qwen3-30B-A3B: 48 layers of qkv 2048 x 5120, o 4096 x 2048, router 2048 x 128, 8 experts."""
    write_model("qwen3-30b-a3b", tmp_path)
    qkv, rest = 2048 * 5120, 2048 * (4096 + 128 + 8 * 3 * 768)
    found = _products(read_config(tmp_path), 3, 100)
    assert found == 100 * (48 * qkv + 47 * rest) + 3 * rest


@pytest.mark.parametrize("prompts", ["²x8", "4", "0x5", "2x", "axb"])
def test_what_is_wrong_is_said(prompts: str) -> None:
    ended = CliRunner().invoke(bench, ["prefill", "--shape", "tiny", "--prompts", prompts])
    assert ended.exit_code == 1 and "is not NxLEN" in ended.output
