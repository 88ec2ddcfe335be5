"""What a CUDA graph launches has been compiled and loaded before it is captured."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

pytestmark = pytest.mark.gpu
if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)

from albireo.ipc.config import EngineConfig  # noqa: E402
from albireo.workers.engine.cuda import graphs, mixed_graphs  # noqa: E402
from albireo.workers.kernels.cuda import e4m7_decode, e4m7_gemm  # noqa: E402
from albireo.workers.models.config import ModelConfig  # noqa: E402

from ..workers.engine_story import BIG, CONFIG, GEMMA, Results  # noqa: E402
from .compilers import watch_compilers  # noqa: E402

_BFLOAT16 = msgspec.structs.replace(BIG, dtype="bfloat16")
_NARROW = msgspec.structs.replace(_BFLOAT16, e4m7_weights="only", kv_cache_dtype="e4m7")
# Sizes of these tests alone: what this process has compiled for others would not be noticed.
_DENSE = replace(CONFIG, hidden_size=320, intermediate_size=448, head_dim=64)
_WINDOWED = replace(GEMMA, hidden_size=352, intermediate_size=144, head_dim=80)
_SPARSE = replace(
    CONFIG, hidden_size=288, num_layers=3, num_experts=8, expert_size=80, experts_per_token=3,
    dense_layers=frozenset([1]),
)  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "config"),
    [
        pytest.param(_BFLOAT16, _DENSE, id="dense"),
        pytest.param(_NARROW, _DENSE, id="12-bits"),
        pytest.param(_BFLOAT16, _WINDOWED, id="windowed"),
        pytest.param(_BFLOAT16, _SPARSE, id="sparse"),
    ],
)
def test_no_kernel_is_compiled_in_a_capture(
    engine: EngineConfig, config: ModelConfig, make_engine: Callable[..., Results],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if engine is _NARROW and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs an H100 or H200")
    before: list[str] = []
    late: list[str] = []
    captures = 0

    def note(what: str) -> None:
        (late if torch.cuda.is_current_stream_capturing() else before).append(what)

    def captured(*given: Any) -> Any:
        nonlocal captures
        captures += 1
        return real_captured(*given)

    real_captured = graphs.captured
    for module in (graphs, mixed_graphs):
        monkeypatch.setattr(module, "captured", captured)
    watch_compilers(monkeypatch, note)
    e4m7_gemm._kernel.cache_clear()
    e4m7_decode._kernel.cache_clear()
    make_engine(engine, config)
    assert captures > 50 and len(before) > 10
    assert not late
