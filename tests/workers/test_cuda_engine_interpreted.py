"""The GPU's engine without a GPU: real kernels in the interpreter, events that happen at once.

Graphs are not here (tests/gpu has them); all else is: plans, tables, mixed
steps, sampling, flights and their collector.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from albireo.ipc.plan import PlanView
from albireo.workers.engine.engine import Engine
from albireo.workers.engine.step import StepResult
from albireo.workers.kernels.cpu.kernels import CpuKernels
from albireo.workers.models.config import ModelConfig, RopeConfig
from albireo.workers.models.load import load_model, load_rank
from albireo.workers.parallel.communicator import SingleRank

from .engine_driver import ENGINE, Driver, Request
from .interpreted import use_interpreter

use_interpreter()

from albireo.workers.engine.cuda import flights  # noqa: E402
from albireo.workers.engine.cuda.engine import CudaEngine  # noqa: E402
from albireo.workers.engine.cuda.profile_plans import profile_plans  # noqa: E402
from albireo.workers.kernels.cuda.kernels import CudaKernels  # noqa: E402
from albireo.workers.sampling.cuda.sampler import CudaSampler  # noqa: E402

CONFIG = ModelConfig(
    family="qwen3", architecture="Qwen3ForCausalLM", vocab_size=64, hidden_size=32,
    intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    rms_norm_eps=1e-6, rope=RopeConfig(), context_len=64, tie_embeddings=True, qk_norm=True,
)  # fmt: skip
CUDA = msgspec.structs.replace(
    ENGINE, device="cuda", block_size=16, num_blocks=32, max_num_seqs=3, max_num_batched_tokens=24,
    cuda_graphs=False,
)  # fmt: skip
CPU_KERNELS = CpuKernels(torch.float32, False)


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


class Results:
    """What the engine delivers, and the synchronous step that a Driver wants."""

    def __init__(self, make: Callable[..., CudaEngine]) -> None:
        self.failures: list[str] = []
        self.delivered: list[int] = []
        self._rows: Any = None
        self._there = threading.Event()
        self.engine = make(self._deliver, self._fail)

    def step(self, plan: PlanView, idle: bool) -> Any:
        self._there.clear()
        assert self.engine.step(plan, idle) is None
        assert self._there.wait(60)
        assert not self.failures
        return SimpleNamespace(rows=self._rows)

    def _deliver(self, step: int, result: StepResult, step_us: int) -> None:
        assert 0 <= result.forward_us <= step_us
        self._rows = result.rows.copy()
        self.delivered.append(step)
        self._there.set()

    def _fail(self, reason: str) -> None:
        self.failures.append(reason)
        self._there.set()


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


def cpu_driver() -> Driver:
    (model,) = load_model("", CONFIG, torch.float32, "dummy", 1, CPU_KERNELS, print)
    engine = msgspec.structs.replace(CUDA, device="cpu")
    return Driver(Engine(model, CPU_KERNELS, engine, SingleRank()).step, CUDA)


def play(driver: Driver) -> list[list[int]]:
    """Chunked prefill beside decodes, a slot used again, greedy and sampled rows."""
    one = Request(1, [5, 9, 33, 2, 7], slot=0, blocks=[7, 3])
    two = Request(2, list(range(20)), slot=2, blocks=[11, 4, 9], temperature=0.9, seed=5)
    three = Request(3, list(range(40, 58)), slot=1, blocks=[1, 8], temperature=1.0, top_p=0.8)
    driver.run(take=[one], chunk=[(one, 5)])
    driver.run(take=[two], chunk=[(two, 12)], decode=[one])
    driver.run(take=[three], chunk=[(two, 8), (three, 10)], decode=[one])
    driver.run(chunk=[(three, 8)], decode=[two, one])
    for _ in range(3):
        driver.run(decode=[three, one, two])
    again = Request(4, [60, 61, 62], slot=0, blocks=[20])
    driver.run(take=[again], chunk=[(again, 3)], decode=[two])
    driver.run(decode=[again, three])
    return [request.tokens for request in (one, two, three, again)]


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
