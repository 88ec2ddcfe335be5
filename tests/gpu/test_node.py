"""Whole nodes on one GPU and on two: the CPU's tokens, and a group's death."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu
if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)

from albireo.bench.shapes import write_model  # noqa: E402
from albireo.client import Client  # noqa: E402
from albireo.ipc.paths import log_path  # noqa: E402
from albireo.node.launch import stop_node  # noqa: E402

from ..node.processes import pids, wait_for, whole  # noqa: E402
from ..workers.tiny_models import save  # noqa: E402


def _answers(
    node: str, requests: list[tuple[list[int], float]], tokens: int, **params: Any
) -> list[list[int]]:
    with Client.connect(node=node) as client:
        streams = [
            client.stream(
                prompt, max_tokens=tokens, temperature=temperature, ignore_eos=True, seed=9,
                **params,
            )
            for prompt, temperature in requests
        ]  # fmt: skip
        return [[token for delta in stream for token in delta.token_ids] for stream in streams]


def test_a_node_on_the_gpu_answers_as_one_on_the_cpu(
    start_node: Callable[..., str], tiny_model_dir: Path
) -> None:
    """float32, batch-invariant: chunked prefill, reused slots, more requests than slots."""
    requests = [
        ([(7 * i + j) % 256 for j in range(5 + 11 * i)], 0.0 if i % 4 else 0.7) for i in range(20)
    ]
    fields = {
        "model": str(tiny_model_dir), "load_format": "dummy", "dtype": "float32",
        "max_num_seqs": 8, "batch_invariant": True,
    }  # fmt: skip
    cpu = start_node(name="cpu", device="cpu", **fields)
    expected = _answers(cpu, requests, 24)
    stop_node(cpu, now=True)
    for name, changes in (
        ("graphs", {}),
        ("eager", {"cuda_graphs": False, "max_num_batched_tokens": 16}),
        ("serial", {"async_scheduling": False}),
    ):
        node = start_node(name=name, device="cuda", **(fields | changes))
        found = _answers(node, requests, 24)
        stop_node(node, now=True)
        same = sum(a == b for a, b in zip(found, expected, strict=True))
        assert same >= len(requests) - 1, (name, same)


def test_a_node_registers_its_plan_ring(
    start_node: Callable[..., str], tiny_model_dir: Path
) -> None:
    node = start_node(
        name="ring", model=str(tiny_model_dir), load_format="dummy", device="cuda", max_num_seqs=8
    )
    answers = _answers(node, [([i, i + 1, i + 2], 0.0) for i in range(20)], 30)
    assert [len(answer) for answer in answers] == [30] * 20
    log = log_path(node).read_text()
    assert re.search(r"the plan ring's \d+ bytes are registered with CUDA", log)
    assert re.search(r"CUDA graphs: \d+ of mixed steps of up to 2048 tokens", log)


@pytest.mark.alone
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_on_two_gpus(start_node: Callable[..., str], tmp_path: Path) -> None:
    save("qwen3", tmp_path)
    _add_tokenizer(tmp_path)
    requests = [([(5 * i + j) % 96 for j in range(3 + 7 * i)], 0.0) for i in range(12)]
    fields = {"model": str(tmp_path), "dtype": "float32", "max_num_seqs": 16}
    # Tokens of both ranks' shards.
    params = {
        "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2, "logprobs": 3,
        "logit_bias": {5: 2.0, 90: 2.0}, "allowed_token_ids": tuple(range(5, 95)),
    }  # fmt: skip
    one = start_node(name="one", device="cuda", **fields)
    expected = _answers(one, requests, 20)
    edited = _answers(one, requests, 20, **params)
    assert edited != expected
    stop_node(one, now=True)
    for changes in ({}, {"cuda_graphs": False}):
        two = start_node(name="two", device="cuda", groups=(2,), **(fields | changes))
        pairs = [
            (_answers(two, requests, 20), expected),
            (_answers(two, requests, 20, **params), edited),
        ]
        stop_node(two, now=True)
        for found, wanted in pairs:
            assert sum(a == b for a, b in zip(found, wanted, strict=True)) >= len(requests) - 1


@pytest.mark.alone
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_batch_invariant_ranks(start_node: Callable[..., str], tmp_path: Path) -> None:
    """In bfloat16, whose sums are rounded: a request's tokens do not depend on those beside it."""
    write_model("tiny", tmp_path)
    requests = [([(5 * i + j) % 256 for j in range(3 + 17 * i)], 0.7) for i in range(12)]
    node = start_node(
        name="invariant", model=str(tmp_path), load_format="dummy", device="cuda", groups=(2,),
        max_num_seqs=16, batch_invariant=True, enable_prefix_caching=False,
    )  # fmt: skip
    together = _answers(node, requests, 24)
    assert [_answers(node, [request], 24)[0] for request in requests] == together


def _add_tokenizer(directory: Path) -> None:
    """The bytes' tokenizer of the benches; the model has fewer ids, which is fine."""
    config = (directory / "config.json").read_text()
    write_model("tiny", directory)
    (directory / "config.json").write_text(config)


def test_a_group_that_dies_comes_back(start_node: Callable[..., str], tiny_model_dir: Path) -> None:
    """The worker's GPU memory is given back with it, and the next one takes it."""
    node = start_node(
        name="dies", model=str(tiny_model_dir), load_format="dummy", device="cuda", max_num_seqs=4
    )
    assert whole(node)
    os.kill(pids(node)["g0.worker0"], signal.SIGKILL)
    wait_for("the group is ready again", lambda: whole(node), 60)
