"""A request under which its group dies again and again: it is found and refused, alone."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from albireo.client import Client, GroupFailed

from .processes import alive, pids, wait_for, whole

pytestmark = pytest.mark.node
INNOCENT = 4
TOKENS = 60


def test_a_request_that_kills_its_groups_is_refused_and_no_other(
    start_node: Callable[..., str], tiny_model_dir: Path
) -> None:
    node = start_node(
        name="poison", model=str(tiny_model_dir), device="sim", sim_step_ms=20.0, max_failovers=1
    )  # fmt: skip
    answers: dict[int, list[int]] = {}
    deaths = []

    def innocent(number: int) -> None:
        with Client.connect(node=node) as client:
            answer = client.generate([number], max_tokens=TOKENS, seed=number, ignore_eos=True)
            answers[number] = answer.token_ids

    computed, over = threading.Event(), threading.Event()

    def kill() -> None:
        """The group, whenever a token of the poison has been computed since."""
        while computed.wait() and not over.is_set():
            victims = [pid for name, pid in pids(node).items() if "worker" in name]
            for pid in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            wait_for("they are dead", lambda dead=victims: not any(map(alive, dead)), 10)
            deaths.append(victims)
            time.sleep(0.3)  # what was under way has come
            computed.clear()

    def poison() -> None:
        with Client.connect(node=node) as client:
            for _ in client.stream([77], max_tokens=200, ignore_eos=True):
                computed.set()

    threads = [threading.Thread(target=innocent, args=(number,)) for number in range(INNOCENT)]
    threading.Thread(target=kill, daemon=True).start()
    for thread in threads:
        thread.start()
    try:
        with pytest.raises(GroupFailed, match="the only suspect"):
            poison()
    finally:
        over.set()
        computed.set()
    for thread in threads:
        thread.join(60)
    assert 2 <= len(deaths) <= 6
    assert {number: len(found) for number, found in answers.items()} == dict.fromkeys(
        range(INNOCENT), TOKENS
    )
    wait_for("the node is whole", lambda: whole(node), 30)
