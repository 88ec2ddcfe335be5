"""One story for an engine on the CPU and one on the GPU: the same plans, to be the same tokens.

Used in the interpreter and, by tests/gpu, on a real GPU.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import torch

from albireo.ipc.config import EngineConfig
from albireo.ipc.plan import PlanView
from albireo.workers.engine.engine import Engine
from albireo.workers.engine.step import StepResult
from albireo.workers.grammar.vocabulary import Vocabulary
from albireo.workers.kernels.cpu.kernels import CpuKernels
from albireo.workers.models.config import ModelConfig, RopeConfig
from albireo.workers.models.load import load_model
from albireo.workers.parallel.communicator import SingleRank

from .engine_driver import ENGINE, Driver, Request

CONFIG = ModelConfig(
    family="qwen3", architecture="Qwen3ForCausalLM", vocab_size=64, hidden_size=32,
    intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    rms_norm_eps=1e-6, rope=RopeConfig(), context_len=64, tie_embeddings=True, qk_norm=True,
)  # fmt: skip
GEMMA = replace(
    CONFIG, family="gemma3_text", architecture="Gemma3ForCausalLM", head_dim=48, sliding_window=7,
    full_layers=frozenset([1]), local_rope=RopeConfig(theta=100.0), query_pre_attn_scalar=24.0,
    activation="gelu", embedding_scale=32**0.5, output_norms=True,
)  # fmt: skip
"""As CONFIG, with all that sets Gemma 3 apart, and heads that are no power of two."""
CUDA = msgspec.structs.replace(
    ENGINE, device="cuda", block_size=16, num_blocks=32, max_num_seqs=3, max_num_batched_tokens=24,
    cuda_graphs=False,
)  # fmt: skip
BIG = msgspec.structs.replace(
    CUDA, num_blocks=400, max_num_seqs=40, max_num_batched_tokens=64, cuda_graphs=True
)
CPU_KERNELS = CpuKernels(torch.float32, False)


class Results:
    """What the engine delivers, and the synchronous step that a Driver wants."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self.failures: list[str] = []
        self.delivered: list[int] = []
        self.rows: list[list[list[int]]] = []
        self._rows: Any = None
        self._logprobs: Any = None
        self._there = threading.Event()
        self.engine = make(self._deliver, self._fail)

    def step(self, plan: PlanView, idle: bool) -> Any:
        self._there.clear()
        assert self.engine.step(plan, idle) is None
        assert self._there.wait(60)
        assert not self.failures
        return SimpleNamespace(rows=self._rows, logprobs=self._logprobs)

    def _deliver(self, step: int, result: StepResult, step_us: int) -> None:
        assert 0 <= result.forward_us <= step_us
        self._rows = result.rows.copy()
        self._logprobs = result.logprobs.copy()
        self.delivered.append(step)
        self.rows.append(result.rows.tolist())
        self._there.set()

    def _fail(self, reason: str) -> None:
        self.failures.append(reason)
        self._there.set()


def cpu_driver(
    engine: EngineConfig = CUDA,
    config: ModelConfig = CONFIG,
    vocabulary: Vocabulary | None = None,
) -> Driver:
    """An engine of `config` with dummy weights on the CPU."""
    (model,) = load_model("", config, torch.float32, "dummy", 1, CPU_KERNELS, print)
    engine = msgspec.structs.replace(engine, device="cpu")
    made = Engine(model, CPU_KERNELS, engine, SingleRank(), vocabulary)
    return Driver(made.step, engine)


def play_mixed(driver: Driver) -> list[list[int]]:
    """A chunk alone, one that does not end its prompt beside a decode, its end behind it; decodes.

    Both prompts share their first block, which the second one finds in the cache.
    """
    one = Request(1, list(range(3, 21)), slot=1, blocks=[6, 2])
    two = Request(2, list(range(3, 30)), slot=0, blocks=[6, 9], cached=16)
    driver.run(take=[one], chunk=[(one, 10)])
    driver.run(chunk=[(one, 8)])
    driver.run(take=[two], chunk=[(two, 4)], decode=[one])
    driver.run(chunk=[(two, 7)], decode=[one])
    driver.run(decode=[two, one])
    return [one.tokens, two.tokens]


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


def random_chunks(driver: Driver) -> list[list[int]]:
    """Prompts in chunks of any length beside decodes, many at once and few; then decodes alone."""
    chance = random.Random(7)
    requests = [
        Request(
            i + 1, [(5 * i + 3 * j) % 60 for j in range(chance.randint(1, 50))], slot=i,
            blocks=[4 * i + n for n in range(4)], temperature=0.9 * (i % 4 == 0), seed=i,
        )
        for i in range(40)
    ]  # fmt: skip
    waiting, running = list(requests), []
    while waiting or any(request.cached < len(request.tokens) - 1 for request in running):
        taken = [waiting.pop() for _ in range(min(len(waiting), chance.choice((0, 1, 1, 9))))]
        running += taken
        chunk, decode = [], []
        for request in running:
            left = len(request.tokens) - request.cached
            if left > 1 or not request.cached:
                length = min(left, chance.randint(1, 50), 160 - sum(n for _, n in chunk))
                chunk += [(request, length)] if length else []
            elif len(request.tokens) < 62 and chance.random() < 0.8:
                decode.append(request)
        driver.run(take=taken, chunk=chunk, decode=decode)
    for _ in range(3):
        driver.run(decode=[request for request in requests if len(request.tokens) < 62])
    return [request.tokens for request in requests]
