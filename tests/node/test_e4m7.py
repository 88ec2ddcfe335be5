"""Which weights a node gets: 12 bits beside bfloat16, only, or none."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from albireo.node import gpus as gpus_module
from albireo.node.core_plan import make_core_plan
from albireo.node.e4m7 import decide
from albireo.node.gpu_memory import estimate
from albireo.node.gpus import Gpu
from albireo.node.options import NodeOptions, OptionError
from albireo.node.sizing import size_engine

from .test_decisions import MODEL

pytestmark = pytest.mark.usefixtures("cuda_bindings")

GIB = 1 << 30
H100 = Gpu("GPU-0", "H100", 80 * GIB, 79 * GIB, (9, 0), 132 * 128)
PCIE = Gpu("GPU-2", "H100 PCIe", 80 * GIB, 79 * GIB, (9, 0), 114 * 128)
A100 = Gpu("GPU-1", "A100", 80 * GIB, 79 * GIB, (8, 0))
EIGHT = msgspec.structs.replace(
    MODEL,
    e4m7_params=dict.fromkeys((1, 2, 4), 8 << 30),
    loaded_bytes=17 * GIB,
    kv_bytes_per_token=144 << 10,
)


def decided(
    asked: str, model: Any = EIGHT, tp: int = 1, device: str = "cuda", dtype: str = "bfloat16",
    gpus: tuple[Gpu, ...] = (H100,), **fields: Any,
) -> str:  # fmt: skip
    options = NodeOptions(e4m7_weights=asked, **fields)
    return decide(options, device, dtype, model, tp, 4096, 2048, gpus)


def test_auto_has_them_where_they_are_small_beside_the_memory() -> None:
    assert decided("auto") == "beside"
    large = msgspec.structs.replace(EIGHT, e4m7_params=dict.fromkeys((1, 4), 32 << 30))
    assert decided("auto", large) == "off"
    assert decided("auto", large, tp=4, gpus=(H100,) * 4) == "beside"
    assert decided("auto", gpu_memory_utilization=0.5) == "off"


def test_auto_leaves_out_what_does_not_work() -> None:
    assert decided("auto", gpus=(H100, A100), tp=2) == "off"
    assert decided("auto", gpus=(PCIE,)) == "off"
    assert decided("auto", dtype="float32") == "off"
    assert decided("auto", device="cpu", gpus=()) == "off"
    assert decided("auto", batch_invariant=True) == "off"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"device": "cpu", "gpus": ()}, "only is for GPUs, and --device is cpu: leave it out"),
        ({"dtype": "float32"}, "only is for bfloat16, and --dtype is float32"),
        ({"batch_invariant": True}, "which --batch-invariant forbids"),
        ({"gpus": (PCIE,)}, r"16896 cores \(H100 SXM, H200\), and H100 PCIe has 14592"),
        ({"gpus": (A100,)}, r"compute capability 9\.0 \(H100, H200\), and A100 has 8\.0"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        decided("only", **fields)
    assert decided("off", **fields) == "off"


def test_without_the_bindings_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus_module, "has_bindings", lambda: False)
    assert decided("auto") == "off"
    with pytest.raises(OptionError, match="needs the package cuda-bindings"):
        decided("beside")


def sized(**fields: Any) -> tuple[str, int]:
    """What the group is told, and the blocks of its KV cache."""
    options = NodeOptions(max_num_seqs=4096, **fields)
    cores = make_core_plan((1,), "cuda", None, gateways=0)
    engine = size_engine(options, "m", "cuda", "bfloat16", EIGHT, 1, cores, (H100,))
    return engine.e4m7_weights, engine.num_blocks


def test_a_group_is_told_and_its_cache_is_smaller_or_larger() -> None:
    """Copies are not of all layers, and how many they are the worker sees."""
    (told, with_copies), (_, without) = sized(), sized(e4m7_weights="off")
    assert told == "beside" and sized(e4m7_weights="only")[0] == "only"
    assert with_copies == without
    block = EIGHT.kv_bytes_per_token * 16
    assert sized(e4m7_weights="only")[1] - without == pytest.approx(4 * GIB / block, abs=2)


def test_auto_leaves_the_cache_that_is_asked_for() -> None:
    assert sized(kv_cache_gib=30)[0] == "beside"
    assert sized(kv_cache_gib=45)[0] == "off"
    assert sized(kv_cache_gib=45, e4m7_weights="beside")[0] == "beside"


def test_the_cache_has_what_they_leave() -> None:
    def weights(mode: str, tp: int = 1) -> int:
        memory = estimate(EIGHT, tp, 8, 512, 0.9, False, [H100], mode)
        return memory.weights + memory.copies

    assert weights("off") == EIGHT.loaded_bytes + EIGHT.rope_bytes
    assert weights("beside") - weights("off") == 12 * GIB
    assert weights("only") - weights("off") == -4 * GIB
    assert weights("beside", 2) - weights("off", 2) == 6 * GIB
