"""What a request may ask of the engine besides tokens: edits, logprobs, copied blocks."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from albireo.ipc.config import EngineConfig
from albireo.ipc.plan import COPY_BLOCK, COPY_IN, COPY_OUT, LOGPROB_WORDS, PlanView
from albireo.workers.engine.batch import StepBatch
from albireo.workers.engine.engine import Engine
from albireo.workers.engine.step import StepResult
from albireo.workers.kernels.interface import KVLayer
from albireo.workers.parallel.communicator import HostCommunicator, SingleRank
from albireo.workers.sampling import candidates, draw, edits, logprobs
from albireo.workers.sampling.compiled import compile_all
from albireo.workers.sampling.sampler import MODES

from .edit_reference import Ask
from .engine_driver import ENGINE, Driver, Request
from .reference_kernels import ReferenceKernels
from .sampling_ranks import on_ranks
from .sampling_reference import Filters, params_of, rows_of
from .sampling_reference import draw as draw_tokens
from .test_engine import CONFIG, PROMPT, load, request

VOCAB = CONFIG.vocab_size
ASK = Ask(
    repetition=1.4, presence=0.3, frequency=0.2, biases={7: 1.5, 300: -2.0, 9: 0.5},
    banned=(3, 4, 5), min_tokens=6, bad_words=((7,), (9, 12)),
)  # fmt: skip
HOW: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "top_k": 60, "min_p": 0.01, "seed": 11}


class Recorded:
    """An engine, the raw logits of its steps [R, V], and the records of its results."""

    def __init__(self, engine: EngineConfig = ENGINE) -> None:
        model = load(1)[0]
        whole_forward = model.forward
        self.logits: list[np.ndarray] = []
        self.records: list[list[int]] = []

        def forward(batch: StepBatch, kv: list[KVLayer]) -> torch.Tensor:
            logits = whole_forward(batch, kv)
            self.logits.append(logits.numpy().copy())
            return logits

        model.forward = forward  # type: ignore[method-assign]
        self._engine = Engine(model, ReferenceKernels(), engine, SingleRank())
        self.driver = Driver(self._step, engine)

    def _step(self, plan: PlanView, idle: bool) -> StepResult:
        result = self._engine.step(plan, idle)
        self.records += result.logprobs.tolist()
        return result


def expected_token(logits: np.ndarray, prompt: list[int], output: list[int]) -> int:
    row = ASK.edited(logits, prompt, output)[np.newaxis]
    params = params_of(Filters(0.9, 60, 0.95, 0.01), seeds=[11])
    return int(draw_tokens(row, rows_of([0], [len(prompt) + len(output)]), params)[0])


# ------------------------------------------------------------------ edits


@pytest.mark.parametrize("max_chunk", [1, 5, 64])
def test_tokens_are_drawn_from_the_logits_that_the_request_edited(max_chunk: int) -> None:
    recorded = Recorded()
    prompt = [7, 9, *PROMPT]
    asking = request(1, 0, prompt, ask=ASK, **HOW)
    answer = recorded.driver.generate(asking, 15, max_chunk)
    sampled = [logits[0] for logits in recorded.logits if len(logits)]
    expected = []
    for logits in sampled:
        expected.append(expected_token(logits, prompt, expected))
    assert answer == expected
    plain = Recorded().driver.generate(request(1, 0, prompt, **HOW), 15)
    assert plain != answer


@pytest.mark.parametrize("history", [0, 4, 24])
def test_a_resumed_request_goes_on_as_if_nothing_had_been(history: int) -> None:
    recorded = Recorded()
    first = request(1, 0, ask=ASK, **HOW)
    undisturbed = recorded.driver.generate(first, 20)
    # Another one has had the slot; blocks of the history are still where they were.
    recorded.driver.generate(request(2, 1, PROMPT[::-1], ask=ASK, **HOW), 5)
    tokens = [*PROMPT, *undisturbed[:8]]
    again = Request(
        3, tokens, 1, first.blocks[: history // 4] + list(range(50, 60)), ask=ASK, resumed=8,
        cached=history, **HOW,
    )  # fmt: skip
    assert recorded.driver.generate(again, 12) == undisturbed[8:]


def test_a_plain_batch_mate_sees_nothing_of_it() -> None:
    alone = Recorded().driver.generate(request(1, 0, **HOW), 6)
    driver = Recorded().driver
    plain, asking = request(1, 0, **HOW), request(2, 1, ask=ASK, logprobs=3, **HOW)
    driver.run(take=[asking, plain], chunk=[(asking, 21), (plain, 21)])
    for _ in range(5):
        driver.run(decode=[asking, plain])
    assert plain.tokens[21:] == alone


# ------------------------------------------------------------------ logprobs


def log_softmax(logits: np.ndarray) -> np.ndarray:
    z = logits.astype(np.float64)
    return z - z.max() - math.log(np.exp(z - z.max()).sum())  # type: ignore[no-any-return]


def assert_record(record: list[int], request: int, position: int, token: int, best: int,
                  logits: np.ndarray) -> None:  # fmt: skip
    assert len(record) == LOGPROB_WORDS
    floats = np.array(record, np.int32).view(np.float32)
    logprobs = log_softmax(logits)
    assert record[:2] == [request, position]
    assert floats[2] == pytest.approx(logprobs[token], abs=1e-6)
    assert record[3] == 1 + (logits > logits[token]).sum()
    order = np.argsort(-logits, kind="stable")[:best].tolist()
    assert record[4:24] == order + [-1] * (20 - best)
    assert np.allclose(floats[24 : 24 + best], logprobs[order], atol=1e-6)


def test_logprobs_are_those_of_the_models_own_logits() -> None:
    recorded = Recorded()
    asking = request(4, 2, ask=ASK, logprobs=5, **HOW)
    silent = request(5, 3, **HOW)
    recorded.driver.run(take=[silent, asking], chunk=[(silent, 21), (asking, 21)])
    for _ in range(6):
        recorded.driver.run(decode=[silent, asking])
    assert len(recorded.records) == 7
    for i, (record, logits) in enumerate(zip(recorded.records, recorded.logits, strict=True)):
        assert_record(record, 4, 21 + i, asking.tokens[21 + i], 5, logits[1])


def test_no_logprob_of_a_token_that_is_none() -> None:
    recorded = Recorded()
    nothing = Ask(allowed=(3,), banned=(3,), min_tokens=2)
    asking, other = request(1, 0, ask=nothing, logprobs=2), request(2, 1, logprobs=0)
    rows = recorded.driver.run(take=[asking, other], chunk=[(asking, 21), (other, 21)])
    assert [row[:2] for row in rows] == [[1, 0], [2, 1]]
    assert [record[0] for record in recorded.records] == [2]
    assert recorded.records[0][4] == -1


@pytest.mark.parametrize("max_chunk", [1, 3, 4, 20, 64])
def test_a_prompt_is_scored_across_the_borders_of_its_chunks(max_chunk: int) -> None:
    recorded = Recorded()
    scored = request(6, 1, scored=True, logprobs=1)
    answer = recorded.driver.generate(scored, 2, max_chunk)
    whole = Recorded()
    # One position at a time, sampled: the same logits.
    for length in range(1, len(PROMPT)):
        whole.driver.generate(request(1, 0, PROMPT[:length]), 1)
    records = [record for record in recorded.records if record[1] < len(PROMPT)]
    assert len(records) == len(PROMPT) - 1
    rows = [logits[0] for logits in whole.logits]
    for position, (record, logits) in enumerate(zip(records, rows, strict=True), start=1):
        floats = np.array(record, np.int32).view(np.float32)
        logprobs = log_softmax(logits)
        assert record[:2] == [6, position]
        assert floats[2] == pytest.approx(logprobs[PROMPT[position]], abs=1e-4)
        assert floats[24] == pytest.approx(logprobs.max(), abs=1e-4)
    assert answer == Recorded().driver.generate(request(6, 1), 2)


def test_scores_stand_beside_samples_and_decodes() -> None:
    recorded = Recorded()
    first, second = request(1, 0, logprobs=0), request(2, 1, scored=True, logprobs=2)
    recorded.driver.run(take=[first], chunk=[(first, 21)])
    recorded.driver.run(take=[second], chunk=[(second, 9)], decode=[first])
    recorded.driver.run(chunk=[(second, 12)], decode=[first])
    where = [record[:2] for record in recorded.records]
    assert where == [
        [1, 21], [1, 22], *([2, at] for at in range(1, 10)),
        [2, 21], [1, 23], *([2, at] for at in range(10, 21)),
    ]  # fmt: skip
    for record, token in zip(recorded.records[2:11], PROMPT[1:10], strict=True):
        assert_record(record, 2, record[1], token, 20, recorded.logits[1][record[1]])


# ------------------------------------------------------------------ ranks and modes


@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_ranks_agree_with_one_in_every_mode(mode: str) -> None:
    size = 3
    config = msgspec.structs.replace(ENGINE, tp=size, sampling_mode=mode, num_blocks=80)
    models = load(size)

    def make(communicator: HostCommunicator) -> Engine:
        engine = Engine(models[communicator.rank], ReferenceKernels(), config, communicator)
        engine.warm_up()
        return engine

    engines = on_ranks(size, ENGINE.max_num_seqs, VOCAB, make)

    with ThreadPoolExecutor(size) as threads:

        def step(plan: PlanView, idle: bool) -> StepResult:
            results: list[StepResult] = list(
                threads.map(lambda engine: engine.step(plan, idle), engines)
            )
            for result in results[1:]:
                assert np.array_equal(result.rows, results[0].rows)
                assert np.array_equal(result.logprobs, results[0].logprobs)
            records.extend(results[0].logprobs.tolist())
            return results[0]

        records: list[list[int]] = []
        answers = _play(Driver(step))
        alone = Recorded()
        assert answers == _play(alone.driver)
        assert [record[:2] for record in records] == [record[:2] for record in alone.records]
        logprobs = np.array(records, np.int32).view(np.float32)[:, 2]
        expected = np.array(alone.records, np.int32).view(np.float32)[:, 2]
        assert np.allclose(logprobs, expected, atol=1e-4)


def _play(driver: Driver) -> list[list[int]]:
    """Requests of all kinds together, scored prompts in chunks among them."""
    asks: list[dict[str, Any]] = [
        {"ask": ASK, **HOW},
        {"ask": Ask(allowed=(1, 2, 200, 300)), "temperature": 1.0},
        {"logprobs": 20, "scored": True},
        {"temperature": 1.3, "seed": 3},
        {"top_p": 0.9, "temperature": 5.0, "seed": 4, "logprobs": 1},
    ]
    requests = [request(i + 1, i, PROMPT[i:], **ask) for i, ask in enumerate(asks)]
    for one in requests:
        driver.run(take=[one], chunk=[(one, 10)])
        driver.run(chunk=[(one, len(one.tokens) - 10)])
    for _ in range(8):
        driver.run(decode=requests)
    return [one.tokens for one in requests]


# ------------------------------------------------------------------ copied blocks


SWAPPING = msgspec.structs.replace(ENGINE, num_swap_blocks=8)


def test_a_swapped_request_goes_on_in_other_blocks() -> None:
    undisturbed = Recorded().driver.generate(request(1, 0), 12)
    recorded = Recorded(SWAPPING)
    first = request(1, 0)
    recorded.driver.generate(first, 4)
    out = [(COPY_OUT, block, 7 - i) for i, block in enumerate(first.blocks[:7])]
    recorded.driver.run(copy=out)
    recorded.driver.generate(request(2, 0, PROMPT[::-1]), 12)
    back = [(COPY_IN, 7 - i, 50 + i) for i in range(7)]
    again = Request(3, first.tokens, 4, list(range(50, 60)), cached=24)
    recorded.driver.run(take=[again], chunk=[(again, 1)], copy=back)
    while len(again.tokens) < len(PROMPT) + 12:
        recorded.driver.run(decode=[again])
    assert again.tokens[len(PROMPT) :] == undisturbed


def test_what_a_copy_costs_is_measured_before_the_first_plan() -> None:
    with_room: Any = Recorded(SWAPPING)
    without: Any = Recorded()
    assert 0 < with_room._engine.warm_up().swap_block_ns < 1_000_000_000
    assert without._engine.warm_up().swap_block_ns == 0


def test_copies_go_out_then_around_then_in() -> None:
    recorded = Recorded(SWAPPING)
    engine: Any = recorded._engine
    keys = engine._kv[1].keys
    for block in range(6):
        keys[block] = block
    recorded.driver.run(
        copy=[
            (COPY_IN, 2, 0), (COPY_BLOCK, 3, 1), (COPY_BLOCK, 1, 4), (COPY_OUT, 3, 2),
            (COPY_BLOCK, 5, 3), (COPY_OUT, 5, 3),
        ]
    )  # fmt: skip
    assert [float(keys[block].mean()) for block in range(6)] == [3, 3, 2, 5, 3, 5]


def test_a_copy_of_a_block_that_is_none_is_refused() -> None:
    recorded = Recorded(SWAPPING)
    with pytest.raises(ValueError, match="copies block 8, but there are 8"):
        recorded.driver.run(copy=[(COPY_OUT, 1, 8)])
    with pytest.raises(ValueError, match="copies block 0, but there are 0"):
        Recorded().driver.run(copy=[(COPY_IN, 0, 1)])


# ------------------------------------------------------------------ what a plan cannot ask


def test_a_score_of_a_row_that_is_none_is_refused() -> None:
    recorded = Recorded()
    whole_step = recorded.driver.step

    def step(plan: PlanView, idle: bool) -> StepResult:
        plan.score = np.array([[5, 1]], np.int32)
        return whole_step(plan, idle)

    recorded.driver.step = step
    one = request(1, 0)
    with pytest.raises(ValueError, match="with 5 rows of chunks scores rows 5 to 5"):
        recorded.driver.run(take=[one], chunk=[(one, 5)])


def test_all_kernels_of_a_step_are_made_before_the_fork() -> None:
    compile_all()
    kernels = [
        value
        for module in (candidates, draw, edits, logprobs)
        for value in vars(module).values()
        if hasattr(value, "signatures") and hasattr(value, "_cache")
        and type(value._cache).__name__ == "FolderCache"
    ]  # fmt: skip
    assert len(kernels) >= 10
    made = [len(kernel.signatures) for kernel in kernels]
    test_ranks_agree_with_one_in_every_mode("vocab")
    assert [len(kernel.signatures) for kernel in kernels] == made
    assert made == [1] * len(kernels)
