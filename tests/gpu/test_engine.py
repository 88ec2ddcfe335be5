"""The engine on a GPU: transformers' logits, the CPU's tokens, graphs or not."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

pytestmark = pytest.mark.gpu
if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)

from albireo.bench.shapes import write_model  # noqa: E402
from albireo.ipc.config import EngineConfig  # noqa: E402
from albireo.ipc.plan import PlanView  # noqa: E402
from albireo.ipc.ring import RingReader, RingWriter, create_ring  # noqa: E402
from albireo.ipc.rings import plan_ring  # noqa: E402
from albireo.workers.engine.cuda.mixed_graphs import MixedGraphs  # noqa: E402
from albireo.workers.engine.cuda.mixed_sizes import MixedSize  # noqa: E402
from albireo.workers.engine.cuda.step_parts import StepParts  # noqa: E402
from albireo.workers.kernels import create  # noqa: E402
from albireo.workers.models.config import ModelConfig  # noqa: E402
from albireo.workers.models.load import load_model, read_config  # noqa: E402

from ..workers.engine_driver import Driver, Request  # noqa: E402
from ..workers.engine_story import (  # noqa: E402
    BIG,
    CONFIG,
    CUDA,
    GEMMA,
    Results,
    cpu_driver,
    play,
    play_mixed,
    random_chunks,
)
from ..workers.grammar_story import (  # noqa: E402
    VOCABULARY,
    check_grammars,
    check_steps_ahead,
    play_grammars,
)
from ..workers.paged_run import PagedRun, dummy_logits  # noqa: E402
from ..workers.parameter_story import PARAMETERS, ParameterStory, check_story  # noqa: E402
from ..workers.tiny_models import TINY, expected_logits, prompts, save  # noqa: E402
from .compilers import watch_compilers  # noqa: E402

_TOLERANCE = 5e-4


@pytest.mark.parametrize("name", TINY)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    """All families; tensor parallelism by threads that share the GPU."""
    reference = save(name, tmp_path)
    kernels = create("cuda", torch.float32, batch_invariant=False)
    expected = [expected_logits(reference, tokens) for tokens in prompts()]
    for tp in (1, TINY[name].tp):
        config = read_config(tmp_path)
        models = load_model(tmp_path, config, torch.float32, "auto", tp, kernels, print)
        found = PagedRun(models, kernels, torch.float32, prompts(), seed=tp).logits()
        for some, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(some, wanted, rtol=0, atol=_TOLERANCE)


@pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0), reason="needs an H100 or H200")
@pytest.mark.parametrize("tp", [1, 2])
def test_logits_by_weights_of_12_bits(tp: int, tmp_path: Path) -> None:
    """As those by bfloat16, but for what that rounds; a rank's 32 columns do not fit, and stay."""
    write_model("tiny", tmp_path)
    config = read_config(tmp_path)
    wide, narrow = (
        dummy_logits(config, create("cuda", torch.bfloat16, False, mode), tp, prompts())
        for mode in ("off", "only")
    )
    error = (narrow - wide).norm() / wide.norm()
    assert 0 < error < 0.02


@pytest.mark.parametrize("tp", [1, 2])
def test_logits_by_a_cache_of_12_bits(tp: int, tmp_path: Path) -> None:
    """As those by bfloat16's own, of which it keeps all but what is small beside others."""
    write_model("tiny", tmp_path)
    config = replace(read_config(tmp_path), head_dim=64)
    wide, narrow = (
        dummy_logits(
            config, create("cuda", torch.bfloat16, False, kv_cache_dtype=cache), tp, prompts()
        )
        for cache in ("model", "e4m7")
    )
    error = (narrow - wide).norm() / wide.norm()
    assert error < 0.02


@pytest.mark.parametrize("config", [CONFIG, GEMMA], ids=["qwen3", "gemma3"])
@pytest.mark.parametrize("graphs", [False, True])
def test_the_tokens_are_those_of_the_cpu(
    graphs: bool, config: ModelConfig, make_engine: Callable[..., Results]
) -> None:
    """Chunks beside decodes, slots used again, greedy and sampled rows."""
    engine = msgspec.structs.replace(CUDA, cuda_graphs=graphs)
    results = make_engine(engine, config)
    assert play(Driver(results.step, engine)) == play(cpu_driver(engine, config))
    assert results.delivered


@pytest.mark.parametrize("graphs", [False, True])
def test_grammars_bind_the_tokens_as_on_the_cpu(
    graphs: bool, make_engine: Callable[[EngineConfig], Results]
) -> None:
    """Masks between forward pass and sampling, with and without graphs; steps launched ahead."""
    engine = msgspec.structs.replace(CUDA, cuda_graphs=graphs)
    found = play_grammars(Driver(make_engine(engine).step, engine))
    assert found == play_grammars(cpu_driver(engine, vocabulary=VOCABULARY))
    check_grammars(found)
    check_steps_ahead(make_engine(engine), engine)


def _many(driver: Driver, count: int, tokens: int) -> list[list[int]]:
    """`count` requests that come one after the other and then all decode."""
    requests = [
        Request(
            i + 1, [(7 * i + j) % 60 for j in range(1 + i % 13)], slot=(i * 3) % 40,
            blocks=[2 * i, 2 * i + 1], temperature=0.8 * (i % 3 == 0), seed=i,
        )
        for i in range(count)
    ]  # fmt: skip
    for request in requests:
        length = len(request.tokens)
        running = [r for r in requests[: request.number - 1] if len(r.tokens) < 31]
        driver.run(take=[request], chunk=[(request, length)], decode=running)
    for _ in range(tokens):
        driver.run(decode=[r for r in requests if len(r.tokens) < 31])
    return [request.tokens for request in requests]


def test_graphs_change_no_token(make_engine: Callable[[EngineConfig], Results]) -> None:
    """Batches of every size up to 40, padded to captured sizes, against launches one by one."""
    eager = msgspec.structs.replace(BIG, cuda_graphs=False)
    captured = _many(Driver(make_engine(BIG).step, BIG), 40, 12)
    assert _many(Driver(make_engine(eager).step, eager), 40, 12) == captured
    assert _many(cpu_driver(BIG), 40, 12) == captured


def test_graphs_change_no_token_of_a_cache_of_12_bits(
    make_engine: Callable[..., Results],
) -> None:
    fields = {"dtype": "bfloat16", "kv_cache_dtype": "e4m7", "batch_invariant": True}
    graphs = msgspec.structs.replace(BIG, **fields)
    eager = msgspec.structs.replace(graphs, cuda_graphs=False)
    config = replace(CONFIG, head_dim=64)
    captured = _many(Driver(make_engine(graphs, config).step, graphs), 40, 12)
    assert _many(Driver(make_engine(eager, config).step, eager), 40, 12) == captured


def test_graphs_of_mixed_steps_change_no_token(
    make_engine: Callable[[EngineConfig], Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every mixed step of these stories is one, padded to several sizes; launched, it is equal."""
    replayed: list[MixedSize] = []
    forward = MixedGraphs.forward

    def spy(graphs: MixedGraphs, size: MixedSize) -> torch.Tensor:
        replayed.append(size)
        return forward(graphs, size)

    def launched(parts: StepParts, size: MixedSize) -> torch.Tensor:
        raise AssertionError(f"a mixed step of {size} was launched kernel by kernel")

    large = msgspec.structs.replace(BIG, max_num_batched_tokens=200)
    for engine, story in ((CUDA, play_mixed), (CUDA, play), (large, random_chunks)):
        graphs = msgspec.structs.replace(engine, cuda_graphs=True)
        eager = msgspec.structs.replace(engine, cuda_graphs=False)
        expected = story(Driver(make_engine(eager).step, engine))
        results = make_engine(graphs)
        with monkeypatch.context() as patch:
            patch.setattr(MixedGraphs, "forward", spy)
            patch.setattr(StepParts, "forward_mixed", launched)
            assert story(Driver(results.step, engine)) == expected
        assert replayed
    assert {size.rows for size in replayed} == {24, 64, 128, 200}


def test_no_step_has_a_kernel_to_compile(
    make_engine: Callable[..., Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = msgspec.structs.replace(
        BIG, max_num_batched_tokens=200, dtype="bfloat16", kv_cache_dtype="e4m7"
    )
    results = make_engine(engine, replace(CONFIG, head_dim=64))
    late: list[str] = []
    watch_compilers(monkeypatch, late.append)
    random_chunks(Driver(results.step, engine))
    assert not late


def test_a_mixed_step_that_no_graph_holds_is_launched(
    make_engine: Callable[[EngineConfig], Results],
) -> None:
    """More short prompts than there are places for, and then few."""
    engine = msgspec.structs.replace(BIG, cuda_graphs=True)

    def story(driver: Driver) -> list[list[int]]:
        requests = [Request(i + 1, [i, i + 1], slot=i, blocks=[i]) for i in range(30)]
        driver.run(take=requests[:20], chunk=[(request, 2) for request in requests[:20]])
        later = requests[20:28]
        driver.run(take=later, chunk=[(each, 2) for each in later], decode=requests[:20])
        return [request.tokens for request in requests[:28]]

    assert story(Driver(make_engine(engine).step, engine)) == story(cpu_driver(engine))


def test_all_parameters_against_one_forward_pass(
    make_engine: Callable[[EngineConfig], Results],
) -> None:
    """Tokens, logprobs, scores, blocks through the host; the same with graphs and without."""
    told = []
    for graphs in (True, False):
        engine = msgspec.structs.replace(PARAMETERS, cuda_graphs=graphs)
        story = ParameterStory(make_engine(engine).step, 40, seed=3)
        told.append(story.play())
        # Of some 500 tokens; near ties may go the other way than on the CPU.
        check_story(story, most_wrong=2)
        assert all(count > 3 for count in story.moves.values())
    assert told[0] == told[1]


@pytest.mark.alone
def test_steps_are_queued_without_waiting(make_engine: Callable[[EngineConfig], Results]) -> None:
    """The launches of several steps return before the first has ended; results come in order."""
    _load_kernels(make_engine)
    results = make_engine(CUDA)
    before = len(results.delivered)
    torch.cuda._sleep(200_000_000)
    for plan in _three_plans():
        results.engine.step(plan, False)
    assert len(results.delivered) == before
    torch.cuda.synchronize()
    results.engine.finish()
    assert len(results.delivered) == before + 3
    alone = cpu_driver(CUDA).generate(Request(1, [3, 4, 5], slot=1, blocks=[0, 1]), 3)
    assert results.rows[-1][0][2] == alone[-1]


@pytest.mark.alone
def test_plans_are_copied_from_their_ring(
    make_engine: Callable[..., Results], caplog: pytest.LogCaptureFixture
) -> None:
    """Each frame is in use until its copy is done; where CUDA refuses the memory, none is."""
    _load_kernels(make_engine)
    spec = plan_ring(0, CUDA)
    fd = create_ring(spec)
    writer, reader = RingWriter(spec, fd), RingReader(spec, fd, "worker0", at_once=spec.frames)
    os.close(fd)
    ring, cudart = torch.frombuffer(reader.memory, dtype=torch.uint8), torch.cuda.cudart()
    expected = cpu_driver(CUDA).generate(Request(1, [3, 4, 5], slot=1, blocks=[0, 1]), 3)
    for in_use in (3, 0):
        if not in_use:
            cudart.cudaHostRegister(ring.data_ptr(), ring.nbytes, 0)
        results = make_engine(CUDA, plan_memory=reader.memory)
        refused = "could not be registered with CUDA (error 712)" in caplog.text
        assert refused == (in_use == 0)
        torch.cuda._sleep(200_000_000)
        for plan in _three_plans():
            writer.reserve(0)[: plan.words.nbytes] = plan.words.tobytes()
            writer.publish(plan.words.nbytes)
            results.engine.step(PlanView(reader.wait(1)), False)
        assert results.engine.plans_in_use() == in_use
        torch.cuda.synchronize()
        assert results.engine.plans_in_use() == 0
        for _ in range(3):
            reader.release()
        results.engine.finish()
        assert results.rows[-1][0][2] == expected[-1]
    assert int(cudart.cudaHostUnregister(ring.data_ptr())) == 0


def _load_kernels(make_engine: Callable[[EngineConfig], Results]) -> None:
    """Each is compiled and loaded where it is launched first, which takes longer than a step."""
    results = make_engine(CUDA)
    for plan in _three_plans():
        results.engine.step(plan, False)
    results.engine.finish()


def _three_plans() -> list[PlanView]:
    """Of one request: a prefill and two decodes, whose tokens nobody has seen."""
    plans: list[PlanView] = []

    def keep(plan: PlanView, idle: bool) -> Any:
        plans.append(plan)
        return SimpleNamespace(rows=torch.empty(0, 3))

    driver = Driver(keep, CUDA)
    request = Request(1, [3, 4, 5], slot=1, blocks=[0, 1])
    driver.run(take=[request], chunk=[(request, 3)])
    for _ in range(2):
        request.tokens.append(0)
        driver.run(decode=[request])
    return plans
