"""The GPU's engine without a GPU: real kernels in the interpreter, events that happen at once.

Graphs are stand-ins that do their work again, those of decodes not even that (tests/gpu
has real ones); all else is here: plans, tables, mixed steps, padding, sampling, flights
and their collector.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

from albireo.ipc.config import EngineConfig
from albireo.ipc.plan import MAX_PLAN_SCORES, PlanView
from albireo.ipc.ring import RingReader, RingWriter, create_ring
from albireo.ipc.rings import plan_ring
from albireo.workers.engine.batch import StepBatch
from albireo.workers.kernels.interface import KVLayer
from albireo.workers.models.config import ModelConfig
from albireo.workers.models.llama import Model
from albireo.workers.models.load import load_rank
from albireo.workers.parallel.communicator import SingleRank

from ..plans import plan_of
from .engine_driver import Driver, Request
from .engine_story import CONFIG, CUDA, GEMMA, Results, cpu_driver, play, play_mixed
from .interpreted import use_interpreter

use_interpreter()

from albireo.workers.engine.cuda import (  # noqa: E402
    block_copies,
    flights,
    grammar_rows,
    mixed_graphs,
)
from albireo.workers.engine.cuda.engine import CudaEngine  # noqa: E402
from albireo.workers.engine.cuda.event_waiter import EventTimes  # noqa: E402
from albireo.workers.engine.cuda.mixed_graphs import MixedGraphs  # noqa: E402
from albireo.workers.engine.cuda.mixed_sizes import (  # noqa: E402
    MixedSize,
    captured_mixed_sizes,
)
from albireo.workers.engine.cuda.profile_plans import profile_plans  # noqa: E402
from albireo.workers.kernels.cuda.kernels import CudaKernels  # noqa: E402
from albireo.workers.sampling.cuda.logprobs import Logprobs  # noqa: E402
from albireo.workers.sampling.cuda.sampler import CudaSampler  # noqa: E402

from .grammar_story import VOCABULARY, check_grammars, check_steps_ahead, play_grammars  # noqa: E402
from .parameter_story import PARAMETERS, ParameterStory, check_story  # noqa: E402


class FakeEvent:
    """A CUDA event on a device that is always done, but for copies to the host."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.at = 0.0
        self._late: deque[Callable[[], object]] = deque()

    reached = True

    def query(self) -> bool:
        return self.reached

    def record(self, stream: FakeStream) -> None:
        self.at = time.perf_counter()
        self._late = stream.late

    def happen(self) -> None:
        assert self.at
        with contextlib.suppress(IndexError):
            while True:
                self._late.popleft()()

    def synchronize(self) -> None:
        self.happen()

    def elapsed_time(self, end: FakeEvent) -> float:
        return (end.at - self.at) * 1000


class FakeWaiter:
    """EventWaiter of a device that is always done."""

    def wait(
        self, before: FakeEvent | None, begun: FakeEvent, forwarded: FakeEvent, sampled: FakeEvent,
        done: FakeEvent,
    ) -> EventTimes:  # fmt: skip
        done.synchronize()
        gap_ms = None if before is None else before.elapsed_time(begun)
        return EventTimes(gap_ms, begun.elapsed_time(forwarded), forwarded.elapsed_time(sampled))


class FakeStream:
    """A CUDA stream; late: copies to the host, made when somebody waits for what is behind them."""

    def __init__(self) -> None:
        self.late: deque[Callable[[], object]] = deque()

    def wait_event(self, event: FakeEvent) -> None:
        event.happen()


class FakeCopies:
    """StreamCopies of a device that is the host; to the host they are as late as can be."""

    def __init__(self, stream: FakeStream) -> None:
        self._late = stream.late

    def to_device(self, device: int, host: int, nbytes: int) -> None:
        ctypes.memmove(device, host, nbytes)

    def to_host(self, host: int, device: int, nbytes: int) -> None:
        self._late.append(functools.partial(ctypes.memmove, host, device, nbytes))


class FakeGraph:
    """A CUDA graph whose work is done again, and its result put where it was at first."""

    replays = 0

    def __init__(self, work: Callable[[], Any], result: Any) -> None:
        self._work, self._result = work, result

    def replay(self) -> None:
        FakeGraph.replays += 1
        again = self._work()
        if self._result is not None:
            self._result.copy_(again)


def fake_capture(work: Callable[[], Any], pool: object) -> tuple[FakeGraph, Any]:
    result = work()
    return FakeGraph(work, result), result


class Account:
    """In place of a MemoryAccount."""

    def taking(self, part: str) -> Any:
        return contextlib.nullcontext()

    def describe(self) -> str:
        return ""


@pytest.fixture
def make_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Results]:
    """make_engine(EngineConfig, config) -> Results around a CudaEngine of a dummy model."""
    fake = {
        "Event": FakeEvent,
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda: None,
    }
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(f"{CudaEngine.__module__}.StreamCopies", FakeCopies)
    monkeypatch.setattr(flights, "EventWaiter", FakeWaiter)
    staging = ((flights, "staging_words"), (grammar_rows, "staging_words"))
    for module, name in (*staging, (block_copies, "pinned_words")):
        monkeypatch.setattr(module, name, lambda words: torch.zeros(words, dtype=torch.int32))
    # The interpreter takes half a second for the 20 best of a row.
    for name in ("MAX_PLAN_SCORES", "MAX_TOP_LOGPROBS"):
        monkeypatch.setattr(f"{profile_plans.__module__}.{name}", 2)
    numbers = CudaKernels(torch.float32, False, torch.device("cpu"))

    def make(
        engine: EngineConfig, config: ModelConfig = CONFIG, plan_memory: memoryview | None = None,
        kernels: CudaKernels = numbers,
    ) -> Results:  # fmt: skip
        model = load_rank("", config, kernels.dtype, "dummy", 1, 0, kernels, print)
        vocab, seqs = config.vocab_size, engine.max_num_seqs
        sampler = CudaSampler(seqs, vocab, 0, None, "cpu")
        logprobs = Logprobs(seqs, MAX_PLAN_SCORES, vocab, 0, SingleRank(), "cpu")
        return Results(
            lambda deliver, fail: CudaEngine(
                model,
                kernels,
                engine,
                sampler,
                logprobs,
                deliver,
                fail,
                Account(),  # type: ignore[arg-type]
                vocabulary=VOCABULARY,
                plan_memory=plan_memory,
            )
        )

    return make


@pytest.fixture
def results(make_engine: Callable[[EngineConfig], Results]) -> Results:
    return make_engine(CUDA)


@pytest.mark.parametrize("config", [CONFIG, GEMMA], ids=["qwen3", "gemma3"])
def test_the_tokens_are_those_of_the_cpu(
    config: ModelConfig, make_engine: Callable[..., Results]
) -> None:
    results = make_engine(CUDA, config)
    results.engine.warm_up()
    assert results.delivered == [], "what warming up samples is nobody's result"
    assert play(Driver(results.step, CUDA)) == play(cpu_driver(CUDA, config))
    results.engine.finish()


def test_nothing_is_sampled_before_the_last_tokens_have_left(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps launched one behind the other while nobody waits for any of them."""
    landing, wait = threading.Event(), FakeWaiter.wait

    def held_back(waiter: FakeWaiter, *events: Any) -> EventTimes:
        assert landing.wait(60)
        return wait(waiter, *events)

    monkeypatch.setattr(FakeWaiter, "wait", held_back)
    landing.set()
    driver, expected = Driver(results.step, CUDA), cpu_driver()
    request, same = (
        Request(1, [5, 9], slot=0, blocks=[7], temperature=1.0, seed=1) for _ in range(2)
    )
    for each, one in ((driver, request), (expected, same)):
        each.run(take=[one], chunk=[(one, 2)])
    for _ in range(3):
        expected.run(decode=[same])
    assert len(set(same.tokens[2:])) > 1
    landing.clear()
    sizes = CUDA.max_num_seqs, CUDA.max_num_batched_tokens, CUDA.block_size, CUDA.max_model_len
    for number in range(3):
        assert results.engine.step(plan_of(*sizes, step=number + 1, decode=[0]), False) is None
    landing.set()
    results.engine.finish()
    assert [token for ((_, _, token),) in results.rows] == same.tokens[2:]


def test_steps_are_padded_to_what_is_captured(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed_graphs, "captured", fake_capture)
    monkeypatch.setattr(mixed_graphs, "borrowed", lambda logits: logits)
    engine = results.engine
    with torch.inference_mode():
        engine._mixed = MixedGraphs([MixedSize(12, 2, 3, 3)], engine._parts.forward_mixed, None)
    FakeGraph.replays = 0
    assert play_mixed(Driver(results.step, CUDA)) == play_mixed(cpu_driver())
    assert FakeGraph.replays == len(results.delivered) == 5
    engine.finish()


def test_the_smallest_graph_that_holds_a_step_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_graphs, "captured", fake_capture)
    monkeypatch.setattr(mixed_graphs, "borrowed", lambda logits: logits)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    sizes = captured_mixed_sizes(512, 100)
    graphs = MixedGraphs(sizes, lambda size, is_brief=False: torch.zeros(size.logits), None)
    for step, expected in (
        ((1, 0, 1, 1), (64, 8, 16, 16)),
        ((64, 8, 16, 16), (64, 8, 16, 16)),
        ((65, 1, 16, 17), (128, 8, 64, 64)),
        ((60, 9, 3, 3), (256, 16, 16, 16)),
        ((300, 1, 99, 100), (384, 24, 100, 100)),
        ((512, 32, 100, 100), (512, 32, 100, 100)),
        ((513, 1, 0, 1), None),
        ((300, 33, 0, 1), None),
        ((300, 1, 0, 101), None),
    ):
        assert graphs.padded(MixedSize(*step)) == expected, step
        assert all(size.holds(MixedSize(*step)) for size in sizes if size == expected)


def test_all_parameters_against_one_forward_pass(
    make_engine: Callable[[EngineConfig], Results],
) -> None:
    """Tokens, logprobs, scores, with slots taken again after copies through the host."""
    results = make_engine(PARAMETERS)
    story = ParameterStory(results.step, 3, seed=14, outputs=4, scores=2)
    story.play()
    check_story(story)
    assert all(story.moves.values()), story.moves
    results.engine.finish()


def test_a_cache_of_12_bits_changes_no_token(make_engine: Callable[..., Results]) -> None:
    """Its blocks are copied within it, to the host and back as any others."""
    found = []
    for e4m7 in (False, True):
        kernels = CudaKernels(torch.bfloat16, False, torch.device("cpu"), e4m7_cache=e4m7)
        engine = msgspec.structs.replace(PARAMETERS, dtype="bfloat16")
        results = make_engine(engine, replace(CONFIG, head_dim=64), kernels=kernels)
        story = ParameterStory(results.step, 3, seed=14, outputs=4, scores=2)
        story.play()
        assert all(story.moves.values()), story.moves
        found.append([player.tokens for player in story.players])
        results.engine.finish()
    assert found[0] == found[1]


def test_grammars_bind_the_tokens_as_on_the_cpu(results: Results) -> None:
    found = play_grammars(Driver(results.step, CUDA))
    assert found == play_grammars(cpu_driver(vocabulary=VOCABULARY))
    check_grammars(found)
    results.engine.finish()


def test_grammars_with_steps_launched_ahead(results: Results) -> None:
    check_steps_ahead(results, CUDA)


def test_as_many_logits_as_rows_in_another_order(
    make_engine: Callable[[EngineConfig], Results],
) -> None:
    """Scored rows come after those that sample, even where each row of a step is one of them."""
    results = make_engine(PARAMETERS)
    story = ParameterStory(results.step, 1, seed=0, outputs=1, scores=1)
    (player,) = story.players
    player.tokens[:] = [5, 9]
    player.asking.prompt_len, player.first, player.scored = 2, 2, 1
    story.play()
    check_story(story)


class FakeRuntime:
    """CUDA's: what is registered with it.  status: 0, or why nothing is."""

    def __init__(self, status: int) -> None:
        self.status, self.registered = status, {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.registered[address] = nbytes
        return self.status

    def cudaHostUnregister(self, address: int) -> None:
        del self.registered[address]


@pytest.mark.parametrize("status", [0, 712])
def test_plans_are_read_from_their_ring(
    status: int, make_engine: Callable[..., Results], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """A frame is in use until its copy is done; where CUDA does not take the ring, it is staged."""
    runtime, staged = FakeRuntime(status), []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    stage = flights.Flight.stage
    monkeypatch.setattr(flights.Flight, "stage", lambda *args: staged.append(1) or stage(*args))
    spec = plan_ring(0, CUDA)
    fd = create_ring(spec)
    writer, reader = RingWriter(spec, fd), RingReader(spec, fd, "worker0", at_once=spec.frames)
    results = make_engine(CUDA, plan_memory=reader.memory)
    assert list(runtime.registered.values()) == [len(reader.memory)]
    monkeypatch.setattr(FakeEvent, "reached", False)

    def step(plan: PlanView, idle: bool) -> Any:
        writer.reserve(0)[: plan.words.nbytes] = plan.words.tobytes()
        writer.publish(plan.words.nbytes)
        answer = results.step(PlanView(reader.wait(1)), idle)
        in_use = results.engine.plans_in_use()
        assert in_use == (0 if status else reader.held)
        if reader.held == 3:
            monkeypatch.setattr(FakeEvent, "reached", True)
            assert results.engine.plans_in_use() == 0
            monkeypatch.setattr(FakeEvent, "reached", False)
            in_use = 0
        for _ in range(reader.held - in_use):
            reader.release()
        return answer

    request = Request(1, [5, 9, 33], slot=2, blocks=[7])
    tokens = Driver(step, CUDA).generate(request, 5)
    assert tokens == cpu_driver().generate(Request(1, [5, 9, 33], slot=2, blocks=[7]), 5)
    assert len(staged) == (5 if status else 0)
    assert ("could not be registered with CUDA (error 712)" in caplog.text) == bool(status)
    results.engine.finish()
    assert bool(runtime.registered) == bool(status), "what was registered is so no more"
    os.close(fd)


def test_a_plan_that_contradicts_the_slots_is_refused(results: Results) -> None:
    driver = Driver(results.step, CUDA)
    request = Request(1, [1, 2, 3, 4], slot=0, blocks=[0])
    driver.run(take=[request], chunk=[(request, 1)])
    request.cached = 2
    with pytest.raises(ValueError, match="starts at position 2"):
        driver.run(chunk=[(request, 2)])


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


def test_a_layer_of_every_size_runs_before_the_first_request(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, heads = [], []
    layers = Model.layers_of_each_kind

    def spy(model: Model, batch: StepBatch, kv: list[KVLayer], head: bool) -> None:
        sizes.append(len(batch.tokens))
        heads.extend([len(batch.tokens)] * head)
        layers(model, batch, kv, head)

    monkeypatch.setattr(Model, "layers_of_each_kind", spy)
    results.engine.warm_up()
    assert sizes == [1, 2, 4, 8, 16, 24]
    assert heads == sizes, "3 that sample, and 128 that are scored"
    assert (CUDA.max_num_batched_tokens, CUDA.max_num_seqs) == (24, 3)
    results.engine.finish()


def test_modes_are_measured_before_the_worst_steps(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which have PyTorch keep the memory that they need; measuring by a graph gives it back."""
    order: list[str] = []
    engine = results.engine
    launch = engine._launch

    def spy(*given: Any) -> None:
        order.append("step")
        launch(*given)

    def tune(time_us: Any) -> dict[str, Any]:
        order.append("modes")
        return {}

    monkeypatch.setattr(engine, "_launch", spy)
    monkeypatch.setattr(engine._sampler, "tune", tune)
    engine.warm_up()
    assert order[:2] == ["modes", "step"] and order.count("modes") == 1
    engine.finish()
