"""What is decided about GPUs before a worker runs: which, for whom, how much memory for what."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

import albireo.node.gpus as gpus_module
from albireo.bench.shapes import write_model
from albireo.ipc.params import SamplingDefaults
from albireo.node.core_plan import make_core_plan
from albireo.node.fork_protocol import Load
from albireo.node.gpu_memory import estimate
from albireo.node.gpus import Gpu, chosen
from albireo.node.options import NodeOptions, OptionError
from albireo.node.placement import _ask, assign
from albireo.node.preload import _model_info
from albireo.node.sizing import size_engine
from albireo.workers.models.load import read_config

from .test_decisions import MODEL
from .test_e4m7 import H100

GIB = 1 << 30
TEXT = SimpleNamespace(strips_first_space=False, special_ids=frozenset((2, 1)), tool_style="hermes")
GPUS = [Gpu(f"GPU-{n}a", "H100", 80 * GIB, (70 + n) * GIB) for n in range(4)]
SXM = msgspec.structs.replace(H100, free=70 * GIB)
BIG = msgspec.structs.replace(
    MODEL,
    vocab_size=150_000,
    weight_bytes=16 * GIB,
    loaded_bytes=17 * GIB,
    kv_bytes_per_token=144 << 10,
    activation_bytes_per_token=256 << 10,
)


def test_experts_are_counted(tmp_path: Path) -> None:
    """All experts' weights; a token's activations are those of its eight experts."""
    write_model("qwen3-30b-a3b", tmp_path)
    load = Load(
        model_path=str(tmp_path), model_name="moe", device="cuda", dtype="bfloat16",
        tokenizer_path="", chat_template=None, load_format="dummy", tp_degrees=(1,),
        batch_invariant=False, gateways=0,
    )  # fmt: skip
    info = _model_info(load, read_config(tmp_path), "bfloat16", TEXT, SamplingDefaults())
    assert info.weight_bytes == info.loaded_bytes == pytest.approx(2 * 30.53e9, rel=1e-3)
    assert info.rope_bytes == 40960 * 128 * 4
    of_experts = 8 * (3 * 768 * 2 + 2048 * 4)
    assert info.activation_bytes_per_token == 4 * 2048 * 2 + of_experts


def test_each_rank_has_all_rotary_tables(tmp_path: Path) -> None:
    """Gemma's are two: 256 MiB on each GPU, however many share the weights."""
    write_model("gemma-3-4b", tmp_path)
    load = Load(
        model_path=str(tmp_path), model_name="gemma", device="cuda", dtype="bfloat16",
        tokenizer_path="", chat_template=None, load_format="dummy", tp_degrees=(1,),
        batch_invariant=False, gateways=0,
    )  # fmt: skip
    info = _model_info(load, read_config(tmp_path), "bfloat16", TEXT, SamplingDefaults())
    assert info.rope_bytes == 256 << 20
    for tp in (1, 4):
        memory = estimate(info, tp, 8, 512, 0.9, False, GPUS[:1])
        assert memory.weights == info.loaded_bytes // tp + (256 << 20)


@pytest.mark.parametrize(
    ("visible", "numbers"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("2", [2]),
        ("3, 0", [3, 0]),
        ("GPU-1a,GPU-3", [1, 3]),
        ("1,7,2", [1]),
        ("-1,0", []),
    ],
)
def test_visible_devices(visible: str | None, numbers: list[int]) -> None:
    assert chosen(GPUS, visible) == [GPUS[number] for number in numbers]


def test_groups_get_consecutive_gpus_where_all_are_alike() -> None:
    assert assign((1, 2), GPUS, lambda *_: 0) == [(GPUS[0],), (GPUS[1], GPUS[2])]
    with pytest.raises(OptionError, match=r"asks for 6 ranks .* but 4 are visible \(H100\)"):
        assign((2, 4), GPUS, lambda *_: 0)


def test_ranks_of_a_group_are_near_to_each_other() -> None:
    """Four GPUs in two pairs that are linked, 0 with 2 and 1 with 3."""

    def crossed(one: Gpu, other: Gpu) -> int:
        return 0 if (GPUS.index(one) - GPUS.index(other)) % 2 == 0 else 51

    first, second = (GPUS[0], GPUS[2]), (GPUS[1], GPUS[3])
    assert assign((2, 2), GPUS, crossed) == [first, second]
    assert assign((1, 2), GPUS, crossed) == [(GPUS[1],), first]
    assert assign((2,), GPUS[1:], crossed) == [second]
    assert assign((4,), GPUS, crossed) == [tuple(GPUS)]
    # Two of three pairs cannot be had; one is better than none.
    assert assign((3,), GPUS, crossed) == [tuple(GPUS[:3])]


def test_what_nvml_says_of_two_gpus() -> None:
    class Refused(Exception):
        pass

    def p2p(one: str, other: str, index: int) -> int:
        assert index == 4
        return 0 if {one, other} == {"a", "b"} else 1

    def ancestor(one: str, other: str) -> int:
        if "d" in one + other:
            raise Refused
        return 0 if {one, other} == {"b", "c"} else 30

    nvml = SimpleNamespace(
        NVMLError=Refused, NVML_P2P_CAPS_INDEX_NVLINK=4, NVML_P2P_STATUS_OK=0,
        NVML_TOPOLOGY_SYSTEM=50, nvmlDeviceGetHandleByUUID=str, nvmlDeviceGetP2PStatus=p2p,
        nvmlDeviceGetTopologyCommonAncestor=ancestor,
    )  # fmt: skip
    known = _ask(nvml, "abcd")
    assert known["a", "b"] == known["b", "a"] == 0
    assert (known["b", "c"], known["a", "c"], known["a", "d"]) == (1, 31, 51)


def size(gpus: list[Gpu], tp: int = 1, **fields: object) -> object:
    options = msgspec.structs.replace(NodeOptions(max_num_seqs=64), **fields)
    cores = make_core_plan(options.groups, "cuda", None, 16)
    return size_engine(options, "/m", "cuda", "bfloat16", BIG, tp, cores, gpus)


def test_blocks_are_what_is_left() -> None:
    memory = estimate(BIG, 1, 64, 2048, 0.9, True, GPUS[1:])
    assert memory.free == 71 * GIB
    assert memory.weights == 17 * GIB
    assert memory.activations == 2048 * (256 << 10)
    taken = memory.weights + memory.activations + memory.logits + memory.context + memory.graphs
    assert memory.kv_bytes == int(71 * GIB * 0.9) - taken
    engine = size(GPUS[1:2], max_num_seqs=64)
    assert engine.num_blocks == min(memory.most_kv_bytes // (16 * (144 << 10)), 64 * 256)
    fewer = size(GPUS[1:2], max_num_seqs=64, gpu_memory_utilization=0.4)
    assert 256 < fewer.num_blocks < engine.num_blocks
    half = estimate(BIG, 2, 64, 2048, 0.9, True, GPUS[:2])
    assert (half.weights, half.free) == (memory.weights // 2, 70 * GIB)


def test_graphs_have_room_for_the_largest_step_that_is_one() -> None:
    model = msgspec.structs.replace(BIG, layer_products=2 * 10**8)

    def graphs(tp: int, seqs: int) -> float:
        """Rows whose activations are counted besides what graphs take anyway."""
        memory = estimate(model, tp, seqs, 8192, 0.9, True, GPUS[:tp])
        return (memory.graphs - (512 << 20)) / model.activation_bytes_per_token

    assert (graphs(1, 64), graphs(2, 64)) == (1024, 2048)  # Mixed steps; sums of 16 MiB.
    assert graphs(1, 2048) == 2048  # Decodes alone.


def left_of(text: str) -> tuple[float, float]:
    """What the sum that an error tells really leaves, and what it says of that."""
    free, share, parts = re.match(
        r"H100: ([\d.]+) GiB free x ([\d.]+) (- .*?) (?=leaves|is)", text
    ).groups()
    taken = sum(float(each) for each in re.findall(r"- [a-z0-9 ]+? (\d+\.\d\d)", parts))
    said = re.search(r"(leaves|is) ([\d.]+) GiB", text)
    return float(free) * float(share) - taken, float(said[2]) * (1 if said[1] == "leaves" else -1)


@pytest.mark.parametrize(
    ("share", "e4m7", "words"),
    [
        (0.2, "off", r"is 1?\d\.\d\d GiB too much, a KV cache not counted, 0 blocks of 16 tokens "),
        (0.25, "off", r"leaves 0\.50 GiB for the KV cache and steps, 227 blocks of 16 tokens "),
        (0.25, "beside", r"- weights 17\.00 leaves 0\.50 GiB for the KV cache and steps, 227"),
        (0.2, "only", r"- weights 15\.00 is 1\.00 GiB too much"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_with_the_arithmetic(
    share: float, e4m7: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus_module, "has_bindings", lambda: True)
    model = msgspec.structs.replace(BIG, e4m7_params={1: 4 * GIB})
    options = NodeOptions(max_num_seqs=64, gpu_memory_utilization=share, e4m7_weights=e4m7)
    cores = make_core_plan(options.groups, "cuda", None, 16)
    with pytest.raises(OptionError) as refused:
        size_engine(options, "/m", "cuda", "bfloat16", model, 1, cores, [SXM])
    assert re.search(words, str(refused.value)), refused.value
    really, said = left_of(str(refused.value))
    assert said == pytest.approx(really, abs=0.05)


def test_a_cache_of_a_given_size_is_taken_as_it_is() -> None:
    assert size(GPUS[:1], kv_cache_gib=1.0).num_blocks == GIB // (16 * (144 << 10))


def test_a_cache_that_no_gpu_has_beside_the_weights_is_refused() -> None:
    many = {"max_num_seqs": 256}
    assert size(GPUS[:1], kv_cache_gib=52.0, **many).num_blocks == 52 * GIB // (16 * (144 << 10))
    with pytest.raises(
        OptionError,
        match=r"--kv-cache-gib 64 takes 64\.00 GiB of each GPU, but H100 has \d+\.\d\d GiB free, "
        r"of which the weights take 17\.00: lower it, ",
    ):
        size(GPUS[:1], kv_cache_gib=64.0, **many)
    assert size(GPUS[:2], 2, kv_cache_gib=64.0, **many).tp == 2
