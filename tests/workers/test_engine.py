"""The engine on a tiny random model: tokens do not depend on how the work was cut up."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from albireo.ipc.plan import PlanView
from albireo.ipc.shared_memory import create
from albireo.workers.engine.batch import StepBatch
from albireo.workers.engine.engine import Engine
from albireo.workers.engine.step import StepResult
from albireo.workers.kernels.interface import KVLayer
from albireo.workers.models.config import ModelConfig, RopeConfig
from albireo.workers.models.llama import Model
from albireo.workers.models.load import load_model
from albireo.workers.parallel.communicator import SingleRank
from albireo.workers.parallel.shared import SharedMemoryCommunicator, shared_bytes, slab_bytes

from .engine_driver import ENGINE, Driver, Request
from .reference_kernels import ReferenceKernels

CONFIG = ModelConfig(
    family="llama",
    architecture="LlamaForCausalLM",
    vocab_size=384,
    hidden_size=48,
    intermediate_size=96,
    num_layers=2,
    num_heads=6,
    num_kv_heads=3,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope=RopeConfig(),
    context_len=64,
    tie_embeddings=False,
)
PROMPT = [random.Random(1).randrange(CONFIG.vocab_size) for _ in range(21)]


def load(tp: int) -> list[Model]:
    return load_model("", CONFIG, torch.float32, "dummy", tp, ReferenceKernels(), lambda line: None)


@pytest.fixture
def driver() -> Driver:
    return Driver(Engine(load(1)[0], ReferenceKernels(), ENGINE, SingleRank()).step)


def request(number: int, slot: int, prompt: list[int] | None = None, **how: Any) -> Request:
    blocks = random.Random(number).sample(range(10 * slot, 10 * slot + 10), 10)
    return Request(number, list(prompt or PROMPT), slot, blocks, **how)


HOWS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.7, "top_p": 0.8, "seed": -6},
]


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("max_chunk", [1, 3, 4, 20])
def test_a_prefill_in_chunks_samples_as_a_whole_one(
    driver: Driver, max_chunk: int, how: dict[str, Any]
) -> None:
    whole = driver.generate(request(1, 0, **how), 12)
    assert driver.generate(request(2, 1, **how), 12, max_chunk) == whole


def test_sampling_differs_by_seed_and_from_greedy(driver: Driver) -> None:
    answers = [driver.generate(request(i + 1, i, **how), 12) for i, how in enumerate(HOWS)]
    assert len({tuple(answer) for answer in answers}) == 3


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_a_preempted_request_goes_on_as_if_nothing_had_been(
    driver: Driver, how: dict[str, Any]
) -> None:
    undisturbed = driver.generate(request(1, 0, **how), 16)
    first = request(2, 1, **how)
    driver.generate(first, 6)
    # Another request takes over its slot and blocks, before it comes back elsewhere.
    driver.generate(request(3, 1, PROMPT[::-1]), 5)
    again = request(4, 2, first.tokens, **how)
    driver.generate(again, 10)
    assert again.tokens[len(PROMPT) :] == undisturbed


def test_a_slot_and_its_blocks_can_be_reused(driver: Driver) -> None:
    fresh = driver.generate(request(1, 0, PROMPT[:5]), 8)
    driver.generate(request(2, 1), 20)
    assert driver.generate(request(3, 1, PROMPT[:5]), 8) == fresh


def test_prefill_mixed_with_decode_gives_the_tokens_of_each_alone(driver: Driver) -> None:
    alone = [driver.generate(request(i + 1, i, PROMPT[i:], **how), 9) for i, how in enumerate(HOWS)]
    first, second, third = (request(i + 10, i + 3, PROMPT[i:], **h) for i, h in enumerate(HOWS))
    driver.run(take=[first], chunk=[(first, 21)])
    driver.run(take=[second, third], chunk=[(third, 7), (second, 4)], decode=[first])
    rows = driver.run(chunk=[(second, 16), (third, 5)], decode=[first])
    assert [row[0] for row in rows] == [second.number, first.number]
    rows = driver.run(chunk=[(third, 7)], decode=[second, first])
    assert [row[0] for row in rows] == [third.number, second.number, first.number]
    for _ in range(8):
        driver.run(decode=[second, third, first])
    answers = [r.tokens[len(PROMPT) - i :][:9] for i, r in enumerate((first, second, third))]
    assert answers == alone


def test_warm_up_leaves_nothing_behind() -> None:
    warm = Engine(load(1)[0], ReferenceKernels(), ENGINE, SingleRank())
    warm.warm_up()
    cold = Engine(load(1)[0], ReferenceKernels(), ENGINE, SingleRank())
    answers = [Driver(e.step).generate(request(1, 0, temperature=1.0), 8) for e in (warm, cold)]
    assert answers[0] == answers[1]


def test_a_plan_without_work_has_no_rows(driver: Driver) -> None:
    assert driver.run() == []


def test_a_row_that_is_not_finite_fails_alone() -> None:
    model = load(1)[0]
    whole_forward = model.forward
    poisoned: list[int] = []

    def forward(batch: StepBatch, kv: list[KVLayer]) -> torch.Tensor:
        logits = whole_forward(batch, kv)
        logits[poisoned] = torch.nan
        return logits

    model.forward = forward  # type: ignore[method-assign]
    driver = Driver(Engine(model, ReferenceKernels(), ENGINE, SingleRank()).step)
    requests = [request(number, number) for number in (1, 2, 3)]
    driver.run(take=requests, chunk=[(r, 21) for r in requests])
    poisoned.append(1)
    rows = driver.run(decode=requests)
    assert [row[:2] for row in rows] == [[1, 1], [2, 0], [3, 1]]
    assert rows[1][2] == 0
    assert rows[0][2] == rows[2][2]
    poisoned.clear()
    rows = driver.run(decode=[requests[0], requests[2]])
    assert [row[:2] for row in rows] == [[1, 1], [3, 1]]


def test_tensor_parallel_ranks_agree_with_one() -> None:
    size = 3
    shape = (size, ENGINE.max_num_batched_tokens, CONFIG.hidden_size, 6, CONFIG.vocab_size)
    memfd = create("test.comm", shared_bytes(*shape))
    config = msgspec.structs.replace(ENGINE, tp=size)
    engines = [
        Engine(
            model,
            ReferenceKernels(),
            config,
            SharedMemoryCommunicator(memfd, model.rank, size, slab_bytes(*shape), 30.0),
        )
        for model in load(size)
    ]
    os.close(memfd)
    single = Driver(Engine(load(1)[0], ReferenceKernels(), ENGINE, SingleRank()).step)
    with ThreadPoolExecutor(size) as threads:

        def step(plan: PlanView, idle: bool) -> StepResult:
            results: list[StepResult] = list(
                threads.map(lambda engine: engine.step(plan, idle), engines)
            )
            for result in results[1:]:
                assert np.array_equal(result.rows, results[0].rows)
            return results[0]

        group = Driver(step)
        for slot, how in enumerate(HOWS):
            expected = single.generate(request(slot + 1, slot, **how), 10)
            assert group.generate(request(slot + 1, slot, **how), 10, 8) == expected
