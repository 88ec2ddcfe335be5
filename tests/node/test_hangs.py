"""A process that does not answer is found, told of, and replaced; nobody loses a token by it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from albireo.client import AlbireoError, Client
from albireo.ipc.paths import log_path

from .processes import alive, pids, status, wait_for, whole
from .test_failover import STREAMS, Story

pytestmark = pytest.mark.node

HANG_S = 0.6


@pytest.fixture
def node(start_node: Callable[..., str], tiny_model_dir: Path) -> str:
    return start_node(
        name="hang", model=str(tiny_model_dir), load_format="dummy", device="sim", groups=(1, 1),
        sim_step_ms=5.0, step_timeout_s=HANG_S,
    )  # fmt: skip


def log_of(node: str) -> str:
    return Path(log_path(node)).read_text(errors="replace")


@pytest.mark.parametrize("victim", ["g0.worker0", "g0.scheduler", "g0.detokenizer"])
def test_a_hung_actor_of_a_group_costs_a_pause(node: str, victim: str) -> None:
    pid = pids(node)[victim]
    story = Story(node, {"max_tokens": 150, "ignore_eos": True})
    story.wait_for_tokens(5)
    os.kill(pid, signal.SIGSTOP)
    story.join()
    assert [len(each) for each in story.tokens] == [150] * STREAMS
    wait_for("the group is whole again", lambda: not alive(pid) and whole(node), 5)
    log = log_of(node)
    assert "hangs" in log
    assert f"stacks of {victim} (pid {pid}, state T):" in log
    if victim != "g0.detokenizer":  # Without it the others end by themselves, and say so.
        assert "most recent call first" in log


@pytest.mark.parametrize("victim", ["router", "tokenizer", "g0.worker0", "g0.scheduler"])
def test_a_hang_is_found_while_nobody_asks(node: str, victim: str) -> None:
    pid = pids(node)[victim]
    os.kill(pid, signal.SIGSTOP)
    wait_for("it is replaced", lambda: not alive(pid), 4 * HANG_S + 1)
    wait_for("the node is whole again", lambda: whole(node), 5)
    log = log_of(node)
    assert f"stacks of {victim} (pid {pid}, state T):" in log
    assert f"{victim} (pid {pid}) has not answered for {HANG_S:g} s" in log


def test_a_group_that_dies_again_and_again_is_given_up(
    start_node: Callable[..., str], tiny_model_dir: Path
) -> None:
    node = start_node(
        name="again", model=str(tiny_model_dir), load_format="dummy", device="sim", groups=(1, 1),
        sim_step_ms=1.0, max_group_restarts=2,
    )  # fmt: skip

    def states() -> list[str]:
        return [group["state"] for group in status(node)["groups"]]

    for _ in range(3):
        wait_for("both serve", lambda: states() == ["ready", "ready"], 10)
        killed = pids(node)["g1.worker0"]
        os.kill(killed, signal.SIGKILL)
        # It may be back before anybody has looked.
        wait_for(
            "it is down",
            lambda: states() != ["ready", "ready"] or pids(node).get("g1.worker0") != killed,  # noqa: B023
            5,
        )
    wait_for("it is given up", lambda: states() == ["ready", "failed"], 10)
    with Client.connect(node=node) as client:
        assert len(client.generate([1, 2], max_tokens=3, ignore_eos=True).token_ids) == 3


def test_a_stopped_node_says_so(start_node: Callable[..., str], tiny_model_dir: Path) -> None:
    """Its only group given up: requests are refused, not kept waiting."""
    node = start_node(
        name="gone", model=str(tiny_model_dir), load_format="dummy", device="sim",
        sim_step_ms=1.0, max_group_restarts=0,
    )  # fmt: skip
    os.kill(pids(node)["g0.worker0"], signal.SIGKILL)
    wait_for(
        "it is given up", lambda: [g["state"] for g in status(node)["groups"]] == ["failed"], 5
    )
    with Client.connect(node=node) as client, pytest.raises(AlbireoError, match="none of the node"):
        client.generate([1, 2], max_tokens=3)
