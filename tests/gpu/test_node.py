"""Whole nodes on one GPU and on two: transformers' tokens, the CPU's, and a group's death."""

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
from transformers import PreTrainedModel

pytestmark = pytest.mark.gpu
if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)

from albireo.bench.shapes import write_model  # noqa: E402
from albireo.client import Client  # noqa: E402
from albireo.ipc.paths import log_path  # noqa: E402
from albireo.node.launch import stop_node  # noqa: E402
from albireo.workers.models.load import load_model, read_config  # noqa: E402

from ..node.processes import pids, wait_for, whole  # noqa: E402
from ..workers.edit_reference import Ask  # noqa: E402
from ..workers.engine_story import CPU_KERNELS  # noqa: E402
from ..workers.paged_run import PagedRun  # noqa: E402
from ..workers.tiny_models import expected_logits, prompts, save  # noqa: E402
from .near_ties import CLOSE, Scores, check_answers, drawn_by, logits_alone  # noqa: E402

_SEED = 9


def _answers(
    node: str, requests: list[tuple[list[int], float]], tokens: int, **params: Any
) -> list[list[int]]:
    with Client.connect(node=node) as client:
        streams = [
            client.stream(
                prompt, max_tokens=tokens, temperature=temperature, ignore_eos=True, seed=_SEED,
                **params,
            )
            for prompt, temperature in requests
        ]  # fmt: skip
        return [[token for delta in stream for token in delta.token_ids] for stream in streams]


def test_a_node_on_the_gpu_answers_as_one_on_the_cpu(
    start_node: Callable[..., str], tiny_model_dir: Path
) -> None:
    """float32, batch-invariant: chunked prefill, reused slots, more requests than slots.

    Both are compared with one forward pass over each answer, whose near ties may go either way.
    """
    requests = [
        ([(7 * i + j) % 256 for j in range(5 + 11 * i)], 0.0 if i % 4 else 0.7) for i in range(20)
    ]
    fields = {
        "model": str(tiny_model_dir), "load_format": "dummy", "dtype": "float32",
        "max_num_seqs": 8, "batch_invariant": True,
    }  # fmt: skip
    cpu = start_node(name="cpu", device="cpu", **fields)
    _check_dummy(tiny_model_dir, requests, _answers(cpu, requests, 24))
    stop_node(cpu, now=True)
    for name, changes in (
        ("graphs", {}),
        ("eager", {"cuda_graphs": False, "max_num_batched_tokens": 16}),
        ("serial", {"async_scheduling": False}),
    ):
        node = start_node(name=name, device="cuda", **(fields | changes))
        found = _answers(node, requests, 24)
        stop_node(node, now=True)
        _check_dummy(tiny_model_dir, requests, found)


def _check_dummy(
    directory: Path, requests: list[tuple[list[int], float]], answers: list[list[int]]
) -> None:
    """The answers of a node with made-up weights."""
    config = read_config(directory)
    models = load_model(directory, config, torch.float32, "dummy", 1, CPU_KERNELS, print)
    asked = [prompt for prompt, _ in requests]
    whole = [prompt + answer for prompt, answer in zip(asked, answers, strict=True)]
    logits = PagedRun(models, CPU_KERNELS, torch.float32, whole).logits()
    scores = [drawn_by(t, _SEED) if t else logits_alone for _, t in requests]
    assert {len(answer) for answer in answers} == {24}
    check_answers(asked, answers, logits, scores)


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
def test_two_ranks_on_two_gpus(
    start_node: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one: greedy as transformers, and as its logits are when they are edited.

    Also where the GPUs may not map each other's memory.
    """
    reference = save("qwen3", tmp_path)
    _add_tokenizer(tmp_path)
    requests = [([(5 * i + j) % 96 for j in range(3 + 7 * i)], 0.0) for i in range(12)]
    fields = {"model": str(tmp_path), "dtype": "float32", "max_num_seqs": 16, "device": "cuda"}
    # Tokens of both ranks' shards.
    ask = Ask(
        repetition=1.3, presence=0.5, frequency=0.2, biases={5: 2.0, 90: 2.0},
        allowed=tuple(range(5, 95)),
    )  # fmt: skip
    params = {
        "repetition_penalty": ask.repetition, "presence_penalty": ask.presence,
        "frequency_penalty": ask.frequency, "logit_bias": ask.biases, "logprobs": 3,
        "allowed_token_ids": ask.allowed,
    }  # fmt: skip
    for name, changes in (
        ("one", {}),
        ("two", {"groups": (2,)}),
        ("eager", {"groups": (2,), "cuda_graphs": False}),
        ("apart", {"groups": (2,)}),
    ):
        if name == "apart":
            monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
        node = start_node(name=name, **(fields | changes))
        plain, edited = _answers(node, requests, 20), _answers(node, requests, 20, **params)
        log = log_path(node).read_text()
        assert ("all they do together goes through NCCL" in log) == (name == "apart")
        stop_node(node, now=True)
        for answers, scores in ((plain, logits_alone), (edited, ask.edited)):
            assert {len(answer) for answer in answers} == {20}
            _check_greedy(reference, [prompt for prompt, _ in requests], answers, scores)
        assert edited != plain


@pytest.mark.alone
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "name",
    ["gemma3-period", "llama", "mistral-window", "mixtral", "phi3", "qwen2-tied", "qwen3-moe"],
)
def test_two_ranks_answer_as_transformers(
    name: str, start_node: Callable[..., str], tmp_path: Path
) -> None:
    """The families that are not Qwen3, in float32: prompts in chunks beside decodes, greedy.

    Then one by one, with the logprob of every token.
    """
    reference = save(name, tmp_path)
    _add_tokenizer(tmp_path)
    node = start_node(
        name="two", model=str(tmp_path), dtype="float32", device="cuda", groups=(2,),
        max_num_seqs=4, max_num_batched_tokens=48,
    )  # fmt: skip
    answers = _answers(node, [(prompt, 0.0) for prompt in prompts()], 24)
    with Client.connect(node=node) as client:
        again = [
            client.generate(
                prompt, max_tokens=24, temperature=0, ignore_eos=True, logprobs=0, prompt_logprobs=0
            )
            for prompt in prompts()
        ]
    stop_node(node, now=True)
    alone = [answer.token_ids for answer in again]
    for each in (answers, alone):
        assert {len(answer) for answer in each} == {24}
        assert len({token for answer in each for token in answer}) > 20
        _check_greedy(reference, prompts(), each, logits_alone)
    for prompt, answer in zip(prompts(), again, strict=True):
        tokens = prompt + answer.token_ids
        told = [*(answer.prompt_logprobs or []), *(answer.logprobs or [])]
        assert [one.token.token_id for one in told] == tokens[1:]
        rows = expected_logits(reference, tokens)[:-1].log_softmax(1)
        found = torch.tensor([one.token.logprob for one in told])
        torch.testing.assert_close(found, rows[range(len(told)), tokens[1:]], rtol=0, atol=CLOSE)


def _check_greedy(
    reference: PreTrainedModel, asked: list[list[int]], answers: list[list[int]], scores: Scores
) -> None:
    logits = [
        expected_logits(reference, prompt + answer)
        for prompt, answer in zip(asked, answers, strict=True)
    ]
    check_answers(asked, answers, logits, [scores] * len(asked))


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
