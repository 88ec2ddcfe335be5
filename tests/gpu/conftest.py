"""Where tests run side by side, each process sees one GPU, which four of them share.

And an engine to test.  Nothing is imported before the GPU is chosen that might ask CUDA for it.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from albireo.ipc.config import EngineConfig
    from albireo.workers.models.config import ModelConfig

    from ..workers.engine_story import Results

_PROCESSES = 4
"""Of a GPU, as the Makefile starts them."""


def gpu_of(worker: str, visible: str | None) -> str | None:
    """CUDA_VISIBLE_DEVICES of pytest-xdist's process `worker`; visible: that of them all.

    Where it names fewer GPUs than the machine has, and the Makefile counts, more processes share
    each.  None: it stays as it is, for there is no such process, or no GPU to be seen.
    """
    if not worker.startswith("gw") or visible == "":
        return None
    number = int(worker.removeprefix("gw")) // _PROCESSES
    names = visible.split(",") if visible else [str(number)]
    return names[number % len(names)]


# Before anything asks CUDA what there is.
if chosen := gpu_of(
    os.environ.get("PYTEST_XDIST_WORKER", ""), os.environ.get("CUDA_VISIBLE_DEVICES")
):
    os.environ["CUDA_VISIBLE_DEVICES"] = chosen


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Results]]:
    """make_engine(EngineConfig, config) -> Results around a warm CudaEngine of a dummy model."""
    import torch

    from albireo.ipc.config import ActorSpec
    from albireo.workers.engine.cuda.engine import CudaEngine
    from albireo.workers.engine.cuda.worker import create_engine

    from ..workers.engine_story import CONFIG, Results
    from ..workers.grammar_story import VOCABULARY
    from ..workers.test_worker_process import MODEL

    made: list[CudaEngine] = []

    def make(
        engine: EngineConfig, config: ModelConfig = CONFIG, plan_memory: memoryview | None = None
    ) -> Results:
        def create_one(deliver: Any, fail: Any) -> CudaEngine:
            spec = ActorSpec(
                role="worker", name="g0.worker0", node="test", incarnation=0, runtime_dir="",
                threads=1, log_level="info", model=MODEL, engine=engine, group=0, rank=0,
            )  # fmt: skip
            actor: Any = SimpleNamespace(spec=spec, phase=print, fatal=fail)
            made.append(create_engine(actor, {}, config, VOCABULARY, deliver, plan_memory))
            return made[-1]

        results = Results(create_one)
        results.engine.warm_up()
        return results

    yield make
    for engine in made:
        engine.finish()
    made.clear()
    gc.collect()
    torch.cuda.empty_cache()
