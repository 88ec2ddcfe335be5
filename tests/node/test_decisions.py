"""What is decided before a process starts: groups, cores, sizes, the claim on a directory."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import tracemalloc
from pathlib import Path

import msgspec
import pytest

from albireo.ipc.config import ModelInfo
from albireo.node.core_plan import make_core_plan
from albireo.node.fork_protocol import Load
from albireo.node.options import NodeOptions, OptionError, parse_groups
from albireo.node.preload import load_everything
from albireo.node.runtime_dir import RuntimeDir, is_running, read_facts, remove_if_abandoned
from albireo.node.sizing import comm_bytes, size_engine
from albireo.workers.models.config import ModelError

MODEL = ModelInfo(
    name="m", architecture="LlamaForCausalLM", vocab_size=1200, context_len=4096,
    eos_token_ids=(2,), bos_token_id=1, hidden_size=96, num_params=1_000_000,
    weight_bytes=2_000_000, kv_bytes_per_token=1024, tp_degrees=(1, 3),
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "degrees"),
    [("1x1", (1,)), ("2x4", (4, 4)), ("1x4,2x2", (4, 2, 2)), (" 1 x 3 ", (3,))],
)
def test_groups(text: str, degrees: tuple[int, ...]) -> None:
    assert parse_groups(text) == degrees


@pytest.mark.parametrize("text", ["", "2", "2x", "x2", "0x1", "1x0", "-1x1", "1x1;1x1", "65x1"])
def test_groups_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--groups"):
        parse_groups(text)


def test_groups_are_counted_before_they_are_listed() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(OptionError, match="5000000 groups with 10000000 ranks"):
            parse_groups("5000000x2")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_model_len", 1),
        ("max_num_batched_tokens", (1 << 17) + 1),
        ("max_num_queued_reqs", 1 << 64),
        ("max_num_reqs_per_tenant", 1 << 31),
        ("max_failovers", 1 << 31),
        ("journal_max_mib", (1 << 20) + 1),
        ("seed", 10**24),
        ("groups", ()),
    ],
)
def test_numbers_that_no_node_takes(field: str, value: object) -> None:
    with pytest.raises(msgspec.ValidationError, match=rf"`\$.{field}`"):
        msgspec.convert({field: value}, NodeOptions)


@pytest.mark.parametrize(
    ("groups", "device", "cores", "threads", "spins"),
    [
        ((1,), "cpu", 2, 2, False),
        ((1, 1), "cpu", 2, 1, False),
        ((3, 3), "cpu", 2, 1, False),
        ((1,), "cpu", 16, 14, False),
        ((2, 2), "cpu", 64, 15, False),
        ((1,), "sim", 16, 1, True),
        ((1,), "sim", 2, 1, False),
    ],
)
def test_core_plan(
    groups: tuple[int, ...], device: str, cores: int, threads: int, spins: bool
) -> None:
    plan = make_core_plan(groups, device, None, cores)
    assert plan.worker_threads == threads
    assert (plan.spin_us > 0) == spins
    assert f"{cores} cores" in plan.describe()


@pytest.mark.parametrize(
    ("groups", "cores", "threads"),
    [((1,), 16, 8), ((1,) * 4, 16, 2), ((2,), 16, 4), ((1,), 4, 2), ((4, 2, 2), 128, 8),
     ((4, 2, 2), 64, 4), ((1, 1), 1, 1)],
)  # fmt: skip
def test_weights_are_copied_with_a_share_of_half_the_cores(
    groups: tuple[int, ...], cores: int, threads: int
) -> None:
    assert make_core_plan(groups, "cuda", None, cores).loading_threads == threads


def size(**fields: object) -> object:
    options = msgspec.structs.replace(NodeOptions(kv_cache_gib=0.5), **fields)
    cores = make_core_plan(options.groups, "cpu", None, 2)
    return size_engine(options, "/m", "cpu", "bfloat16", MODEL, 1, cores)


def test_sizes() -> None:
    engine = size()
    assert engine.max_model_len == 4096
    assert engine.num_blocks == (1 << 29) // (1024 * 16)
    assert engine.lookahead == 2
    assert comm_bytes(engine, MODEL) == 0
    assert comm_bytes(msgspec.structs.replace(engine, tp=3), MODEL) > 0
    assert size(async_scheduling=False).lookahead == 0
    # No more blocks than all slots could ever fill.
    assert size(max_num_seqs=2, max_model_len=100).num_blocks == 2 * 7


def test_a_cache_too_small_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(OptionError, match=r"holds 65 blocks .* needs 256: raise --kv-cache-gib"):
        size(kv_cache_gib=0.001)


def test_a_cache_without_a_block_is_no_shorter_context() -> None:
    with pytest.raises(OptionError, match=r"holds 0 blocks .*: raise --kv-cache-gib to 0\.01$"):
        size(kv_cache_gib=1e-6)


def test_swap_space_in_blocks() -> None:
    assert size().num_swap_blocks == 0
    assert size(swap_space_gib=0.25).num_swap_blocks == (1 << 28) // (1024 * 16)
    with pytest.raises(OptionError, match=r"--swap-space 1e-06 GiB holds no KV block of 16 KiB"):
        size(swap_space_gib=1e-6)
    with pytest.raises(OptionError, match=r"for each of 2 groups exceeds the .* GiB of memory"):
        size(swap_space_gib=1e6, groups=(1, 1))


def test_the_schedulers_options_reach_the_group() -> None:
    engine = size(
        enable_prefix_caching=False, itl_target_ms=20.0, async_output=False, sampling_mode="gather"
    )
    assert (engine.prefix_caching, engine.itl_target_ms) == (False, 20.0)
    assert (engine.async_output, engine.sampling_mode) == (False, "gather")
    assert size().prefix_caching


_QWEN3_8B = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288
_QWEN3_32B = 2 * 5120 * 5120 + 2 * 5120 * 1024 + 3 * 5120 * 27648


@pytest.mark.parametrize(
    ("products", "tp", "tokens"),
    [
        (_QWEN3_8B, 1, 512), (_QWEN3_8B, 2, 1024), (_QWEN3_8B, 8, 2048),
        (4 * _QWEN3_8B, 1, 512), (_QWEN3_32B, 1, 512), (_QWEN3_32B, 4, 768),
        (_QWEN3_8B // 12, 1, 2048), (_QWEN3_8B // 12, 2, 2048),
    ],
)  # fmt: skip
def test_steps_beside_decodes_fill_a_gpu(products: int, tp: int, tokens: int) -> None:
    """512 rows, or more of a small layer; no more where a node has larger steps for prompts."""
    model = msgspec.structs.replace(MODEL, layer_products=products, tp_degrees=(1, 2, 4, 8))
    options = NodeOptions(kv_cache_gib=1.0, e4m7_weights="off", max_num_batched_tokens=8192)
    cores = make_core_plan((1,), "cpu", None, 2)
    engine = size_engine(options, "/m", "cuda", "bfloat16", model, tp, cores)
    assert engine.mixed_step_tokens == tokens


def test_steps_beside_decodes_elsewhere_are_as_asked() -> None:
    assert size().mixed_step_tokens == 0
    assert size(mixed_step_tokens=96).mixed_step_tokens == 96


def test_other_sizes_refused() -> None:
    with pytest.raises(OptionError, match="exceeds the model's context of 4096"):
        size(max_model_len=5000)
    with pytest.raises(OptionError, match="every running sequence needs a token"):
        NodeOptions(max_num_batched_tokens=10, max_num_seqs=11).check()


def test_a_directory_has_one_owner(node_home: Path) -> None:
    mine = RuntimeDir.claim("a")
    mine.write_facts({"pid": 42})
    assert mine.path.stat().st_mode & 0o777 == 0o700
    assert is_running("a") and not is_running("b")
    with pytest.raises(OptionError, match=r"'a' is running already \(pid 42\)"):
        RuntimeDir.claim("a")
    other = RuntimeDir.claim("b")
    assert read_facts("b") is None
    mine.remove()
    other.remove()
    assert not mine.path.exists() and not is_running("a")


def test_who_only_looks_is_no_owner(node_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A janitor holds the lock for a moment, and removes the directory in which it lies."""
    monkeypatch.setattr("albireo.node.runtime_dir._PATIENCE_S", 20.0)
    path = node_home / "run" / "a"
    path.mkdir(parents=True)
    lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)

    def leave() -> None:
        shutil.rmtree(path)
        os.close(lock)

    leaving = threading.Timer(0.1, leave)
    leaving.start()
    RuntimeDir.claim("a").remove()
    leaving.join()


def test_what_a_dead_node_left_is_cleared_away(node_home: Path) -> None:
    path = node_home / "run" / "a"
    path.mkdir(parents=True)
    (path / "api.sock").write_text("")
    (path / "lock").write_text("")
    mine = RuntimeDir.claim("a")
    assert [each.name for each in path.iterdir()] == ["lock"]
    remove_if_abandoned(path)
    assert path.exists(), "the directory of a live node is nobody else's to remove"
    mine.remove()


def test_an_abandoned_directory_is_removed(node_home: Path) -> None:
    path = node_home / "run" / "a"
    path.mkdir(parents=True)
    (path / "api.sock").write_text("")
    remove_if_abandoned(path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("template", "style"), [('{{ tools }} {"name": f, "parameters": x}', "llama"), (None, "hermes")]
)
def test_the_template_decides_the_form_of_tool_calls(
    tiny_model_dir: Path, template: str | None, style: str
) -> None:
    path = str(tiny_model_dir)
    load = Load(
        model_path=path, model_name="tiny", tokenizer_path=path, chat_template=template,
        device="sim", dtype="auto", load_format="dummy", tp_degrees=(1,), batch_invariant=False,
        gateways=0,
    )  # fmt: skip
    loaded, text, _, _ = load_everything(load, lambda phase: None)
    assert loaded.model.tool_style == text.tool_style == style


def test_a_directory_without_a_model_is_told_so(tmp_path: Path) -> None:
    load = Load(
        model_path=str(tmp_path), model_name="x", tokenizer_path=str(tmp_path), chat_template=None,
        device="sim", dtype="auto", load_format="auto", tp_degrees=(1,), batch_invariant=False,
        gateways=0,
    )  # fmt: skip
    with pytest.raises(ModelError, match="is no model directory: it has no config"):
        load_everything(load, lambda phase: None)
