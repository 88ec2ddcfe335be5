"""Memory that comes by and by, on a real GPU: where a graph finds it, and what it takes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu
if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)

from albireo.bench.nodes import BenchError, running_node  # noqa: E402
from albireo.bench.shapes import shape_directory  # noqa: E402
from albireo.client import Client  # noqa: E402
from albireo.node.launch import stop_node  # noqa: E402
from albireo.node.options import NodeOptions  # noqa: E402
from albireo.node.runtime_dir import read_facts  # noqa: E402
from albireo.workers.kernels.cuda.growing import GrowingMemory  # noqa: E402

from ..node.processes import wait_for  # noqa: E402

GIB = 1 << 30
DEVICE = torch.device("cuda", 0)


def test_a_graph_sees_the_rows_that_have_come_since() -> None:
    memory = GrowingMemory(DEVICE, rows=3)
    width = (5 << 20) // 2  # no multiple of what memory comes in, for three rows or 40
    tensors = [memory.zeros((1_000_000, width), torch.bfloat16) for _ in range(2)]
    which = torch.tensor([2], device=DEVICE)
    out = torch.zeros(2, width, dtype=torch.bfloat16, device=DEVICE)
    tensors[0][2] = 1
    tensors[1][2] = 2
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for n, tensor in enumerate(tensors):
                torch.index_select(tensor, 0, which, out=out[n : n + 1])
                tensor[0] += out[n]
        graph.replay()
        assert out.double().mean(1).tolist() == [1, 2]
        memory.grow(40)
        assert all(not tensor[3:40].any() for tensor in tensors)
        tensors[0][39] = 3
        tensors[1][39] = 4
        which.fill_(39)
        graph.replay()
    assert out.double().mean(1).tolist() == [3, 4]
    assert [tensor[0].double().mean().item() for tensor in tensors] == [4, 6]


@pytest.mark.alone
def test_it_is_the_current_gpus() -> None:
    """Where a device has no number, as that of a rank's kernels."""
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            memory = GrowingMemory(torch.device("cuda"), rows=1)
            tensor = memory.zeros((1000, 1 << 20), torch.uint8)
            before = torch.cuda.mem_get_info(index)[0]
            memory.grow(400)
            tensor[399] += 5
            assert tensor.device == torch.device("cuda", index)
            assert tensor[399].eq(5).all() and not tensor[398].any()
            taken = before - torch.cuda.mem_get_info(index)[0]
            assert taken == pytest.approx(400 << 20, abs=64 << 20)


@pytest.mark.alone
def test_memory_is_taken_when_it_comes_and_no_sooner() -> None:
    def free() -> int:
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info(DEVICE)[0]

    row = 3 << 20
    most = 4 * torch.cuda.mem_get_info(DEVICE)[1] // row
    before = free()
    memory = GrowingMemory(DEVICE, rows=2)
    tensor = memory.zeros((most, row), torch.uint8)
    assert before - free() == pytest.approx(memory.nbytes(2), abs=64 << 20)
    rows = memory.rows_in(GIB)
    assert GIB - (4 << 20) < memory.nbytes(rows) <= GIB
    memory.grow(rows)
    assert before - free() == pytest.approx(memory.nbytes(rows), abs=64 << 20)
    assert not tensor[rows - 1].any()
    with pytest.raises(RuntimeError, match="cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY"):
        memory.grow(most)


@pytest.mark.alone
def test_a_node_gives_its_cache_what_is_left(start_node: Callable[..., str]) -> None:
    """Everyone hears of it: the scheduler, the router, node.json."""
    fields: dict[str, Any] = {
        "device": "cuda", "load_format": "dummy", "cuda_graphs": False, "kv_cache_dtype": "model",
        "e4m7_weights": "off", "max_num_seqs": 64,
    }  # fmt: skip
    total = torch.cuda.mem_get_info(DEVICE)[0]
    with shape_directory("qwen3-0.6b") as directory:
        share = 9 * GIB / total
        node = start_node(model=directory, gpu_memory_utilization=share, **fields)
        facts = read_facts(node)
        assert facts is not None
        blocks = facts["details"]["g0.worker0"]["num_blocks"]
        assert facts["kv_tokens"] == [16 * blocks]
        # 28 layers x 8 heads x 128 x keys and values x bfloat16; of 9 GiB the rest of the worker
        # has 1.4 GiB of weights, and takes some for its steps.
        assert 5 * GIB < 16 * blocks * 114688 < 7.6 * GIB
        with Client.connect(node=node) as client:
            answer = client.generate(list(range(300)), max_tokens=8, ignore_eos=True)
            assert len(answer.token_ids) == 8
            wait_for("stats", lambda: client.status()["groups"][0]["scheduler"] is not None, 5)
            assert client.status()["groups"][0]["scheduler"]["kv_blocks_total"] == blocks
        stop_node(node, now=True)
        options = NodeOptions(model=directory, gpu_memory_utilization=6 * GIB / total, **fields)
        with pytest.raises(BenchError) as refused, running_node(options):
            pass
    said = str(refused.value)
    assert "one request of 40960 tokens needs 2560: lower --max-model-len to" in said
    assert "steps of 2048 tokens" in said and "weights" in said
