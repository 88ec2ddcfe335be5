"""`albireo bench flood`: a flood of one client does not starve another."""

from __future__ import annotations

from pathlib import Path

import pytest

from albireo.bench.flood import bench_flood
from albireo.node.options import NodeOptions


@pytest.mark.node
def test_a_flood_of_one_client_does_not_starve_another(
    node_home: Path, tiny_model_dir: Path
) -> None:
    options = NodeOptions(
        model=str(tiny_model_dir), load_format="dummy", sim_step_ms=40.0, max_num_seqs=32
    )
    result = bench_flood(options, 200, 60, 5, interval_s=0.8)
    assert result["left_of_the_flood"] > 32
    assert result["times_longer_median"] <= 3
