"""The KV cache in 12 bits a number: where it is possible, and how much it holds."""

from __future__ import annotations

import msgspec
import pytest

from albireo.node.core_plan import make_core_plan
from albireo.node.gpus import Gpu
from albireo.node.kv_cache import e4m7_kv_bytes, with_kv_cache
from albireo.node.options import NodeOptions, OptionError
from albireo.node.sizing import size_engine

from .test_decisions import MODEL

GIB = 1 << 30
H100 = Gpu("GPU-0", "H100", 80 * GIB, 79 * GIB, (9, 0), 132 * 128)
T4 = Gpu("GPU-1", "Tesla T4", 16 * GIB, 15 * GIB, (7, 5))
UNKNOWN = Gpu("GPU-2", "GPU of a driver that does not say", 80 * GIB, 79 * GIB)
EIGHT = msgspec.structs.replace(
    MODEL, loaded_bytes=17 * GIB, kv_bytes_per_token=144 << 10, head_dim=128
)
E4M7 = NodeOptions(kv_cache_dtype="e4m7")


def test_a_token_takes_three_quarters_and_a_power_of_two_for_each_head() -> None:
    heads = 36 * 8
    assert EIGHT.kv_bytes_per_token == heads * 2 * 128 * 2
    assert e4m7_kv_bytes(EIGHT.kv_bytes_per_token, 128) == heads * (2 * 128 * 3 // 2 + 2 * 2)
    assert e4m7_kv_bytes(heads * 2 * 64 * 2, 64) == heads * (2 * 64 * 3 // 2 + 2 * 2)


def test_it_holds_a_third_more_tokens() -> None:
    cores = make_core_plan((1,), "cuda", None, cores=16)
    blocks = []
    for options in (NodeOptions(), E4M7):
        options = msgspec.structs.replace(options, max_num_seqs=4096)
        engine = size_engine(options, "/m", "cuda", "bfloat16", EIGHT, 1, cores, [H100])
        assert engine.kv_cache_dtype == options.kv_cache_dtype
        blocks.append(engine.num_blocks)
    assert blocks[1] / blocks[0] == pytest.approx(4 * 128 / (3 * 128 + 4), rel=1e-3)


def test_auto_leaves_it_as_the_model_has_it() -> None:
    assert with_kv_cache(NodeOptions(), "cpu", "float32", MODEL, ()) is MODEL
    assert with_kv_cache(NodeOptions(), "cuda", "bfloat16", EIGHT, [H100]) is EIGHT


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "gpu", "reason"),
    [
        ("cpu", "bfloat16", 128, None, "is for GPUs, and --device is cpu"),
        ("cuda", "float32", 128, H100, "is for bfloat16, and --dtype is float32"),
        ("cuda", "bfloat16", 96, H100, "64, 128 or 256 numbers, and .* has heads of 96"),
        ("cuda", "bfloat16", 128, T4, "capability 8.0 .*Tesla T4 has 7.5"),
    ],
)
def test_where_it_cannot_be(
    device: str, dtype: str, head_dim: int, gpu: Gpu | None, reason: str
) -> None:
    model = msgspec.structs.replace(EIGHT, head_dim=head_dim)
    with pytest.raises(OptionError, match=f"--kv-cache-dtype e4m7 .*{reason}.*leave it out"):
        with_kv_cache(E4M7, device, dtype, model, [gpu] if gpu else ())


def test_a_driver_that_does_not_say_is_believed() -> None:
    assert with_kv_cache(E4M7, "cuda", "bfloat16", EIGHT, [UNKNOWN]) is not EIGHT
