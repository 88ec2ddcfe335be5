"""`albireo bench flood`: a flood of one client does not starve another."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from albireo.bench.flood import bench_flood
from albireo.bench.nodes import BenchError
from albireo.node.options import NodeOptions


@pytest.mark.node
def test_a_flood_of_one_client_does_not_starve_another(
    node_home: Path, tiny_model_dir: Path
) -> None:
    options = NodeOptions(
        model=str(tiny_model_dir), load_format="dummy", sim_step_ms=40.0, max_num_seqs=32,
        max_num_queued_reqs=8,
    )  # fmt: skip
    result = bench_flood(options, 200, 60, 5, interval_s=0.8)
    assert result["left_of_the_flood"] > 80, "the node has taken the whole flood"
    assert result["times_longer_median"] <= 3


@pytest.mark.node
def test_a_flood_that_the_node_does_not_take_is_none(
    node_home: Path, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = NodeOptions(
        model=str(tiny_model_dir), load_format="dummy", sim_step_ms=1.0, max_model_len=256
    )
    with pytest.raises(BenchError, match=r"a request of the flood failed: .* 256"):
        bench_flood(options, 20, 300, 1, interval_s=0.1)
    gc.collect()
    assert not caplog.records, "of tasks whose errors nobody has looked at"
