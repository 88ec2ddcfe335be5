"""Real nodes on a tiny model: they serve, stand side by side, refuse what is wrong, and leave."""

from __future__ import annotations

import os
import re
import signal
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from albireo.client import Client, GroupFailed, InvalidRequest, TooLong, Unavailable
from albireo.node.events import NodeFailed
from albireo.node.launch import run_detached, stop_node
from albireo.node.options import NodeOptions

from ..text.tiny_tokenizers import sentencepiece
from ..tiny_model import write_tiny_model
from .processes import alive, pids, shared_memory_files, status, wait_for, whole

pytestmark = pytest.mark.node


@pytest.fixture
def tiny(start_node: Callable[..., str], tiny_model_dir: Path) -> Callable[..., str]:
    """Starts a node of the tiny model on the CPU with random weights."""

    def start(**fields: object) -> str:
        given = {"name": "t", "device": "cpu", "dtype": "float32", "max_num_seqs": 8} | fields
        return start_node(model=str(tiny_model_dir), load_format="dummy", **given)

    return start


def greedy(node: str, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Answers with all prompts in flight at once."""
    with Client.connect(node=node) as client:
        streams = [
            client.stream(prompt, max_tokens=tokens, temperature=0, ignore_eos=True)
            for prompt in prompts
        ]
        return [[token for delta in stream for token in delta.token_ids] for stream in streams]


def test_the_welcome_says_of_which_kind_the_tokenizer_is(
    start_node: Callable[..., str], tmp_path: Path
) -> None:
    write_tiny_model(tmp_path)
    sentencepiece().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    node = start_node(name="words", model=str(tmp_path), device="sim", sim_step_ms=1.0)
    with Client.connect(node=node) as client:
        assert client.welcome.strips_first_space


def test_shapes_and_scheduling_agree(tiny: Callable[..., str]) -> None:
    """Chunked prefill, preemption, asynchronous or not, one rank or three: the same tokens."""
    prompts = [[(7 * i + j) % 256 for j in range(5 + 23 * i)] for i in range(8)]
    plain = tiny(name="a", batch_invariant=True)
    expected = greedy(plain, prompts, 24)
    stop_node(plain, now=True)
    assert len({tuple(tokens) for tokens in expected}) > 1
    for fields in (
        {"async_scheduling": False},
        {"max_num_batched_tokens": 16},
        {"kv_cache_gib": 300 * 16 * 2 * 3 * 16 * 2 * 4 / 16 / 2**30, "max_model_len": 256},
        {"groups": (1, 1)},
    ):
        node = tiny(name="b", batch_invariant=True, **fields)
        assert greedy(node, prompts, 24) == expected, fields
        stop_node(node, now=True)
    three = greedy(tiny(name="c", groups=(3,), batch_invariant=True), prompts, 24)
    same = sum(a == b for a, b in zip(three, expected, strict=True))
    assert same >= len(prompts) - 1, "three ranks add in another order; nearly all must agree"


def test_nodes_side_by_side(tiny: Callable[..., str], node_home: Path) -> None:
    first, second = tiny(name="one"), tiny(name="two", groups=(1, 1))
    for name in (first, second):
        folder = node_home / "run" / name
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for path in folder.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        assert whole(name)
    assert not set(pids(first).values()) & set(pids(second).values())
    stop_node(first)
    assert whole(second)


def test_nothing_is_left_behind(tiny: Callable[..., str], node_home: Path) -> None:
    in_shm = shared_memory_files()
    node = tiny(groups=(1, 3))
    greedy(node, [[1, 2, 3]], 4)
    before = pids(node)
    stop_node(node)
    assert not [name for name, pid in before.items() if alive(pid)]
    assert not list((node_home / "run").iterdir())
    assert shared_memory_files() <= in_shm


def test_stopping_lets_requests_finish(
    start_node: Callable[..., str], tiny_model_dir: Path
) -> None:
    node = start_node(name="d", model=str(tiny_model_dir), device="sim", sim_step_ms=10.0)
    with Client.connect(node=node) as client:
        stream = client.stream([1, 2], max_tokens=80, ignore_eos=True)
        next(stream)
        stopper = threading.Thread(target=stop_node, args=(node,))
        stopper.start()
        wait_for("the node drains", lambda: status(node)["draining"], 2)
        with pytest.raises(Unavailable, match="shutting down"):
            client.generate([1], max_tokens=1)
        last = list(stream)[-1]
        assert last.end is not None and last.end.completion_tokens == 80
    stopper.join(10)
    assert not stopper.is_alive()


def test_a_hung_worker_takes_its_group_down(
    start_node: Callable[..., str], tiny_model_dir: Path
) -> None:
    node = start_node(
        name="h", model=str(tiny_model_dir), device="sim", sim_step_ms=5.0, step_timeout_s=0.5,
        max_failovers=0,
    )  # fmt: skip
    before = pids(node)
    with Client.connect(node=node) as client:
        stream = client.stream([1, 2], max_tokens=400, ignore_eos=True)
        next(stream)
        os.kill(before["g0.worker0"], signal.SIGSTOP)
        with pytest.raises(GroupFailed, match=r"step \d+ has no result after") as error:
            list(stream)
        assert error.value.retry
    wait_for("the group is back", lambda: whole(node), 2)
    assert pids(node)["g0.worker0"] != before["g0.worker0"]


def test_bad_requests_harm_nobody(tiny: Callable[..., str]) -> None:
    node = tiny()
    with Client.connect(node=node) as client:
        good = client.stream([1, 2, 3], max_tokens=60, temperature=0, ignore_eos=True)
        for bad, kind in (
            (lambda: client.generate(""), InvalidRequest),
            (lambda: client.generate([]), InvalidRequest),
            (lambda: client.generate([1, 264]), InvalidRequest),
            (lambda: client.generate([1, -1]), InvalidRequest),
            (lambda: client.generate([1] * 600), TooLong),
            (lambda: client.generate([1] * 500, max_tokens=100), TooLong),
            (lambda: client.generate([1], max_tokens=0), InvalidRequest),
            (lambda: client.generate([1], max_tokens=-5), InvalidRequest),
            (lambda: client.generate([1], temperature=float("nan")), InvalidRequest),
        ):
            with pytest.raises(kind):
                bad()
        assert sum(len(delta.token_ids) for delta in good) == 60


def test_a_second_node_of_the_name_is_refused(tiny: Callable[..., str]) -> None:
    node = tiny()
    assert "is running already" in failure(NodeOptions(name=node))
    assert whole(node)


def failure(options: NodeOptions) -> str:
    """Why a node does not start."""
    events = []
    assert run_detached(options, events.append) != 0
    assert isinstance(events[-1], NodeFailed)
    return events[-1].reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"groups": (2,)}, r"does not divide into 2 ranks: .* divide all of them: 1, 3"),
        ({"max_model_len": 100_000}, "exceeds the model's context of 512"),
        ({"kv_cache_gib": 1e-6}, "raise --kv-cache-gib to"),
        ({"load_format": "auto"}, "safetensors"),
    ],
)
def test_what_does_not_fit_is_refused(
    node_home: Path, tiny_model_dir: Path, fields: dict[str, object], reason: str
) -> None:
    given = {"name": "x", "model": str(tiny_model_dir), "load_format": "dummy", "device": "cpu"}
    began = time.monotonic()
    found = failure(NodeOptions(**(given | fields)))  # type: ignore[arg-type]
    assert re.search(reason, found), found
    assert time.monotonic() - began < 30
    assert not (node_home / "run" / "x").exists()


def test_a_model_that_is_not_there(node_home: Path) -> None:
    assert "no such file or directory" in failure(NodeOptions(model="/no/such/model"))


def test_options_that_cannot_be_told_to_a_node(node_home: Path) -> None:
    assert "`$.shutdown_timeout_s`" in failure(NodeOptions(shutdown_timeout_s=float("inf")))
