"""Memory of the engine on a GPU: a step asks CUDA for none, and what is not there is refused."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

pytestmark = pytest.mark.gpu
if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)

from albireo.ipc.config import EngineConfig  # noqa: E402
from albireo.workers.engine.cuda.memory import GpuMemoryError  # noqa: E402
from albireo.workers.engine.cuda.profile_plans import profile_plans  # noqa: E402
from albireo.workers.sampling.cuda.sampler import CudaSampler  # noqa: E402

from ..workers.edit_reference import Ask  # noqa: E402
from ..workers.engine_driver import Driver, Request  # noqa: E402
from ..workers.engine_story import BIG, CONFIG, CUDA, Results, random_chunks  # noqa: E402


def _allocations() -> tuple[int, int]:
    """So far: calls of CUDA for memory, and tensors that the allocator has made of it."""
    stats = torch.cuda.memory_stats()
    return stats["num_device_alloc"], stats["allocation.all.allocated"]


@pytest.mark.parametrize("graphs", [False, True])
def test_a_steady_step_allocates_nothing(
    graphs: bool, make_engine: Callable[[EngineConfig], Results]
) -> None:
    """CUDA is asked for no memory by mixed steps of sizes that have been, nor by decodes.

    In graphs decodes do not ask the allocator either, whatever their rows want of the logits.
    """
    engine = msgspec.structs.replace(BIG, max_num_batched_tokens=200, cuda_graphs=graphs)
    step = make_engine(engine).step
    first = random_chunks(Driver(step, engine))
    device_calls, _ = _allocations()
    assert random_chunks(Driver(step, engine)) == first
    assert _allocations()[0] == device_calls

    driver = Driver(step, engine)
    requests = [
        Request(
            i + 1, [i, i + 1], slot=i, blocks=[2 * i, 2 * i + 1], seed=i,
            temperature=0.8 * (i % 3 == 1), top_p=0.9 if i % 6 == 1 else 1.0,
            ask=Ask(presence=0.5, biases={3: 1.0}) if i % 5 == 2 else Ask(),
            logprobs=3 if i % 7 == 3 else None,
        )
        for i in range(40)
    ]  # fmt: skip
    for some in (requests[:20], requests[20:]):
        driver.run(take=some, chunk=[(request, 2) for request in some])
    # A row alone that asks for nothing, some that ask for all there is, and all of them.
    for decode in (requests[:1], requests[1:10], requests):
        driver.run(decode=decode)
        before = _allocations()
        for _ in range(5):
            driver.run(decode=decode)
        assert _allocations()[0] == before[0]
        if graphs:
            assert _allocations() == before
    before = _allocations()
    held = torch.empty(8, device="cuda")
    assert _allocations()[1] == before[1] + 1 and held.is_cuda, "a tensor is counted"


def test_what_the_worst_steps_take_is_kept_for_them(
    make_engine: Callable[[EngineConfig], Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where modes of sampling are measured, as on several ranks: CUDA is asked for nothing."""

    def tune(self: Any, time_us: Callable[[Callable[[], None]], float]) -> dict[str, Any]:
        x = torch.zeros(1, device="cuda")

        def work() -> None:
            x.add_(1)

        assert time_us(work) > 0
        return {}

    monkeypatch.setattr(CudaSampler, "tune", tune)
    engine = msgspec.structs.replace(BIG, max_num_batched_tokens=8192, cuda_graphs=True)
    results = make_engine(engine)
    before = _allocations()
    for plan in profile_plans(engine):
        results.step(plan, idle=False)
    assert _allocations()[0] == before[0] and _allocations()[1] > before[1]


@pytest.mark.alone
def test_memory_that_does_not_suffice_is_refused_with_the_sum(
    make_engine: Callable[[EngineConfig], Results],
) -> None:
    """Not even the first layer's keys fit: nothing of the cache is there afterwards."""
    free = torch.cuda.mem_get_info()[0]
    block_bytes = CONFIG.num_kv_heads * CONFIG.head_dim * 16 * 4
    too_many = msgspec.structs.replace(CUDA, num_blocks=free // block_bytes + 1000)
    with pytest.raises(GpuMemoryError, match=r"a KV cache of \d+ blocks: of .* GiB, .* were free"):
        make_engine(too_many)
