"""The GPU's engine without a GPU: real kernels in the interpreter, events that happen at once.

Graphs are not here (tests/gpu has them); all else is: plans, tables, mixed
steps, sampling, flights and their collector.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import msgspec
import pytest
import torch

from albireo.workers.models.load import load_rank

from .engine_driver import Driver, Request
from .engine_story import CONFIG, CUDA, Results, cpu_driver, play
from .interpreted import use_interpreter

use_interpreter()

from albireo.workers.engine.cuda import flights  # noqa: E402
from albireo.workers.engine.cuda.engine import CudaEngine  # noqa: E402
from albireo.workers.engine.cuda.profile_plans import profile_plans  # noqa: E402
from albireo.workers.kernels.cuda.kernels import CudaKernels  # noqa: E402
from albireo.workers.sampling.cuda.sampler import CudaSampler  # noqa: E402


class FakeEvent:
    """A CUDA event on a device that is always done."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.at = 0.0

    def record(self, stream: object) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        assert self.at

    def elapsed_time(self, end: FakeEvent) -> float:
        return (end.at - self.at) * 1000


class Account:
    """In place of a MemoryAccount."""

    def taking(self, part: str) -> Any:
        return contextlib.nullcontext()

    def describe(self) -> str:
        return ""


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Results:
    fake = {
        "Event": FakeEvent,
        "current_stream": lambda: None,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda: None,
    }
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(flights, "_pinned", lambda words: torch.zeros(words, dtype=torch.int32))
    kernels = CudaKernels(torch.float32, False, torch.device("cpu"))
    model = load_rank("", CONFIG, torch.float32, "dummy", 1, 0, kernels, print)
    sampler = CudaSampler(CUDA.max_num_seqs, CONFIG.vocab_size, 0, None, "cpu")
    return Results(
        lambda deliver, fail: CudaEngine(
            model,
            kernels,
            CUDA,
            sampler,
            deliver,
            fail,
            Account(),  # type: ignore[arg-type]
        )
    )


def test_the_tokens_are_those_of_the_cpu(results: Results) -> None:
    results.engine.warm_up()
    assert results.delivered == [], "what warming up samples is nobody's result"
    assert play(Driver(results.step, CUDA)) == play(cpu_driver())
    results.engine.finish()


def test_a_plan_that_contradicts_the_slots_is_refused(results: Results) -> None:
    driver = Driver(results.step, CUDA)
    request = Request(1, [1, 2, 3, 4], slot=0, blocks=[0])
    request.cached = 2
    with pytest.raises(ValueError, match="starts at position 2"):
        driver.run(take=[request], chunk=[(request, 2)])


def test_what_goes_wrong_behind_the_launch_ends_the_process(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(event: FakeEvent) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(FakeEvent, "synchronize", break_down)
    request = Request(1, [1, 2], slot=0, blocks=[0])
    with pytest.raises(AssertionError):
        Driver(results.step, CUDA).run(take=[request], chunk=[(request, 2)])
    assert "GPU 0 of the group failed: an illegal memory access" in results.failures[0]


@pytest.mark.parametrize("seqs,tokens,length", [(3, 24, 64), (1, 1, 2), (4, 4, 5), (8, 512, 40)])
def test_the_worst_steps_use_all_rows_and_all_slots(seqs: int, tokens: int, length: int) -> None:
    engine = msgspec.structs.replace(
        CUDA, max_num_seqs=seqs, max_num_batched_tokens=tokens, max_model_len=length
    )
    plans = profile_plans(engine)
    assert max(len(plan.chunk_token) for plan in plans) == min(tokens, seqs * (length - 1))
    assert max(len(plan.chunk) + len(plan.decode) for plan in plans) == min(seqs, tokens)
    for plan in plans:
        assert len(plan.chunk_token) + len(plan.decode) <= tokens
        assert (plan.append[:, 2] < engine.num_blocks).all()
        assert (plan.append[:, 1] < -(-length // engine.block_size)).all()
