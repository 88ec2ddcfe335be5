"""A supervisor that has no descriptors, memory or shared memory left when something dies."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from albireo.client import AlbireoError, Client
from albireo.node.runtime_dir import read_facts

from .processes import alive, pids, status, wait_for, whole

pytestmark = pytest.mark.node
STARVED_S = 0.5


def starve(pid: int, what: str) -> Callable[[], None]:
    """Takes it away; returns what gives it back."""
    kind, value = {
        "files": (resource.RLIMIT_NOFILE, psutil.Process(pid).num_fds()),
        "shared memory": (resource.RLIMIT_FSIZE, 0),
        "memory": (resource.RLIMIT_AS, psutil.Process(pid).memory_info().vms),
    }[what]
    before = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (value, before[1]))
    return lambda: resource.prlimit(pid, kind, before) and None


@pytest.mark.parametrize("what", ["files"])  # the chaos run has the others, too
def test_the_node_outlives_it(
    start_node: Callable[..., str], tiny_model_dir: Path, what: str
) -> None:
    node = start_node(
        name="starved", model=str(tiny_model_dir), device="sim", sim_step_ms=1.0, groups=(1, 1)
    )
    facts = read_facts(node)
    assert facts is not None
    supervisor = int(facts["pid"])
    victims = [pids(node)[name] for name in ("g0.worker0", "tokenizer", "janitor", "understudy")]
    give_back = starve(supervisor, what)
    try:
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        until = time.monotonic() + STARVED_S
        with Client.connect(node=node) as client:
            while time.monotonic() < until:
                # The other group serves all the while.
                answer = client.generate([1, 2], max_tokens=5, ignore_eos=True, timeout_s=10)
                assert len(answer.token_ids) == 5
    finally:
        if alive(supervisor):
            give_back()
    wait_for("the node is whole again", lambda: whole(node), 30)
    assert alive(supervisor)
    now = pids(node)
    assert not set(victims) & set(now.values())

    # And the router, without which nobody hears of it.
    give_back = starve(supervisor, what)
    os.kill(now["router"], signal.SIGKILL)
    time.sleep(STARVED_S)
    give_back()

    def answers() -> bool:
        try:
            return bool(status(node)["groups"]) and whole(node)
        except AlbireoError:
            return False

    wait_for("there is a router again", answers, 30)
