"""The bench of a node's start, with a checkpoint of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from albireo.bench import checkpoint
from albireo.bench.nodes import BenchError
from albireo.bench.shapes import write_model
from albireo.bench.start import bench_start
from albireo.node.options import NodeOptions
from albireo.workers.models.load import load_model, read_config

from ..workers.engine_story import CPU_KERNELS


def test_a_checkpoint_is_one_that_can_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model("tiny", tmp_path)
    config = read_config(tmp_path)
    monkeypatch.setattr(checkpoint, "_SHARD_BYTES", 100_000)
    nbytes = checkpoint.write_checkpoint(tmp_path)
    assert nbytes == 2 * config.num_params()
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1 and sum(each.stat().st_size for each in shards) > nbytes
    (model,) = load_model(tmp_path, config, torch.float32, "auto", 1, CPU_KERNELS, print)
    assert model.config == config


def test_a_start_is_told_phase_by_phase(tmp_path: Path) -> None:
    options = NodeOptions(device="cpu", max_num_seqs=8)
    found = bench_start("tiny", options, "checkpoint", tmp_path, 1)
    (first,) = found["rounds"]
    assert first["ready_s"] == pytest.approx(sum(first["phases_s"].values()), abs=0.1)
    assert {"starting the supervisor", "loading the weights"} <= set(first["phases_s"])
    assert "warming up" in first["workers_phases_s"]["g0.worker0"]
    assert found["checkpoint_gb"] == 0 and found["kv_tokens"] == [8 * 512]
    assert not list(tmp_path.iterdir()), "the checkpoint is removed"


def test_without_room_for_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(directory: Path) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_checkpoint", full)
    with pytest.raises(BenchError, match=r"No space left .*--dir.*--weights dummy"):
        bench_start("tiny", NodeOptions(device="cpu"), "checkpoint", tmp_path, 1)
