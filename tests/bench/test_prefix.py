"""`albireo bench prefix` on a model that runs anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from albireo.bench.nodes import BenchError
from albireo.bench.prefix import bench_prefix
from albireo.node.options import NodeOptions


@pytest.mark.node
def test_a_common_prefix_is_computed_once(node_home: Path, tiny_model_dir: Path) -> None:
    options = NodeOptions(model=str(tiny_model_dir), device="cpu", load_format="dummy")
    result = bench_prefix(options, 64, 0.5, 3)
    assert (result["input_len"], result["shared_len"], result["rounds"]) == (64, 32, 3)
    assert result["hit_tokens_per_prompt"] == 32
    assert result["ttft_ms_apart"] > 0
    assert result["times_lower"] == pytest.approx(
        result["ttft_ms_apart"] / result["ttft_ms_shared"], rel=0.01, abs=0.006
    )  # It has two digits behind the point, and may be below 1 for so small a model.


def test_without_a_cache_there_is_nothing_to_measure() -> None:
    with pytest.raises(BenchError, match="the prefix cache is off"):
        bench_prefix(NodeOptions(enable_prefix_caching=False), 64, 0.5, 3)
