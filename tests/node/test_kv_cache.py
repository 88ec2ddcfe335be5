"""The KV cache in 12 bits a number: where it is possible, and how much it holds."""

from __future__ import annotations

import msgspec
import pytest

from albireo.ipc.config import ModelInfo
from albireo.node.core_plan import make_core_plan
from albireo.node.gpus import Gpu
from albireo.node.kv_cache import choose_kv_cache, e4m7_kv_bytes, with_e4m7_cache
from albireo.node.options import NodeOptions, OptionError
from albireo.node.sizing import size_engine

from .test_decisions import MODEL

pytestmark = pytest.mark.usefixtures("cuda_bindings")

GIB = 1 << 30
H100 = Gpu("GPU-0", "H100", 80 * GIB, 79 * GIB, (9, 0), 132 * 128)
A100 = Gpu("GPU-3", "A100", 80 * GIB, 79 * GIB, (8, 0), 108 * 64)
T4 = Gpu("GPU-1", "Tesla T4", 16 * GIB, 15 * GIB, (7, 5))
UNKNOWN = Gpu("GPU-2", "GPU of a driver that does not say", 80 * GIB, 79 * GIB)
EIGHT = msgspec.structs.replace(
    MODEL, loaded_bytes=17 * GIB, kv_bytes_per_token=144 << 10, kv_layers=36, head_dim=128
)
E4M7 = NodeOptions(kv_cache_dtype="e4m7")


def test_a_token_takes_three_quarters_and_a_power_of_two_for_each_head() -> None:
    heads = 36 * 8
    assert EIGHT.kv_bytes_per_token == heads * 2 * 128 * 2
    assert e4m7_kv_bytes(EIGHT.kv_bytes_per_token, 128) == heads * (2 * 128 * 3 // 2 + 2 * 2)
    assert e4m7_kv_bytes(heads * 2 * 64 * 2, 64) == heads * (2 * 64 * 3 // 2 + 2 * 2)


def test_it_holds_a_quarter_more_tokens() -> None:
    cores = make_core_plan((1,), "cuda", None, cores=16)
    blocks = []
    for options in (NodeOptions(kv_cache_dtype="model"), E4M7):
        options = msgspec.structs.replace(options, max_num_seqs=4096)
        engine = size_engine(options, "/m", "cuda", "bfloat16", EIGHT, 1, cores, [H100])
        assert engine.kv_cache_dtype == options.kv_cache_dtype
        blocks.append(engine.num_blocks)
    # Three quarters and a power of two; one of the 36 layers in bfloat16.
    assert blocks[0] / blocks[1] == pytest.approx((3 * 128 + 4) / (4 * 128) + 1 / 36, rel=1e-3)
    found = with_e4m7_cache(EIGHT)
    assert found.kv_room_per_token - found.kv_bytes_per_token == 4096
    assert EIGHT.kv_room_per_token == EIGHT.kv_bytes_per_token


def test_auto_is_what_was_measured_to_be_faster() -> None:
    def chosen(options: NodeOptions, model: ModelInfo, *gpus: Gpu) -> str:
        return choose_kv_cache(options, "cuda", "bfloat16", model, gpus)

    auto = NodeOptions()
    assert chosen(auto, EIGHT, H100, H100) == "e4m7"
    assert chosen(NodeOptions(kv_cache_dtype="model"), EIGHT, H100) == "model"
    assert chosen(NodeOptions(batch_invariant=True), EIGHT, H100) == "model"
    assert chosen(auto, msgspec.structs.replace(EIGHT, head_dim=96), H100) == "model"
    few, enough = (msgspec.structs.replace(EIGHT, kv_layers=layers) for layers in (4, 5))
    assert chosen(auto, few, H100) == "model" and chosen(auto, enough, H100) == "e4m7"
    for gpu in (A100, UNKNOWN, T4):
        assert chosen(auto, EIGHT, H100, gpu) == "model"
    for device, dtype in (("cuda", "float32"), ("cpu", "bfloat16"), ("sim", "bfloat16")):
        assert choose_kv_cache(auto, device, dtype, EIGHT, [H100]) == "model"


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "gpu", "reason"),
    [
        ("cpu", "bfloat16", 128, None, "is for GPUs, and --device is cpu"),
        ("cuda", "float32", 128, H100, "is for bfloat16, and --dtype is float32"),
        ("cuda", "bfloat16", 96, H100, "64, 128 or 256 numbers, and .* has heads of 96"),
        ("cuda", "bfloat16", 128, T4, "capability 9.0 .*Tesla T4 has 7.5"),
        ("cuda", "bfloat16", 128, UNKNOWN, "driver does not say what GPU of a driver .* has"),
    ],
)
def test_where_it_cannot_be(
    device: str, dtype: str, head_dim: int, gpu: Gpu | None, reason: str
) -> None:
    model = msgspec.structs.replace(EIGHT, head_dim=head_dim)
    with pytest.raises(OptionError, match=f"--kv-cache-dtype e4m7 .*{reason}.*leave it out"):
        choose_kv_cache(E4M7, device, dtype, model, [gpu] if gpu else ())
