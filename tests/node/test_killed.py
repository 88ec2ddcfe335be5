"""kill -9 of any one process: within two seconds the node is whole again, or gone.

Every client in flight gets an answer or an error, and nothing is left behind.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from albireo.client import AlbireoError, Client

from .processes import alive, pids, shared_memory_files, wait_for, whole

pytestmark = pytest.mark.node

DEADLINE_S = 2.0
STREAMS = 6


class Streams:
    """Requests in flight, each of which ends with a count of tokens or an error."""

    def __init__(self, node: str, tokens: int) -> None:
        self.ends: list[int | AlbireoError] = []
        self._started = threading.Semaphore(0)
        self._threads = [
            threading.Thread(target=self._run, args=(node, tokens), daemon=True)
            for _ in range(STREAMS)
        ]
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            assert self._started.acquire(timeout=10)

    def _run(self, node: str, tokens: int) -> None:
        count = 0
        try:
            with Client.connect(node=node) as client:
                for delta in client.stream([5, 6, 7], max_tokens=tokens, ignore_eos=True):
                    if not count:
                        self._started.release()
                    count += len(delta.token_ids)
            self.ends.append(count)
        except AlbireoError as error:
            self.ends.append(error)

    def join(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


@pytest.fixture
def node(start_node: Callable[..., str], tiny_model_dir: Path) -> str:
    return start_node(
        name="k", model=str(tiny_model_dir), load_format="dummy", device="sim", groups=(1, 1),
        sim_step_ms=5.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "victim",
    ["router", "tokenizer", "g0.detokenizer", "g0.scheduler", "g0.worker0", "janitor", "understudy",
     "forkserver"],
)  # fmt: skip
def test_an_actor_is_killed(node: str, victim: str) -> None:
    before = pids(node)
    streams = Streams(node, tokens=200)
    os.kill(before[victim], signal.SIGKILL)
    took = wait_for(
        f"the node is whole again after the death of {victim}",
        lambda: not alive(before[victim]) and whole(node),
        DEADLINE_S,
    )
    streams.join(10)
    assert len(streams.ends) == STREAMS, f"{streams.ends} after {took:.2f} s"
    for end in streams.ends:
        if isinstance(end, AlbireoError):
            assert victim in str(end) or "connection" in str(end), end
        else:
            assert end == 200
    after = pids(node)
    assert after[victim] != before[victim]
    wait_for("all roles are filled", lambda: len({*pids(node).values()}) == len(before), 10)
    untouched = {name for name in before if name.startswith("g1.")}
    if not victim.startswith("g1."):
        assert {n: before[n] for n in untouched} == {n: after[n] for n in untouched}


def test_the_supervisor_is_killed(node: str, node_home: Path) -> None:
    before = pids(node)
    in_shm = shared_memory_files()
    streams = Streams(node, tokens=400)
    os.kill(before["supervisor"], signal.SIGKILL)
    wait_for(
        "no process of the node is left",
        lambda: not any(alive(pid) for pid in before.values()),
        DEADLINE_S,
    )
    wait_for("no file of the node is left", lambda: not (node_home / "run" / node).exists(), 1.0)
    streams.join(5)
    assert len(streams.ends) == STREAMS
    assert all(isinstance(end, AlbireoError) for end in streams.ends)
    assert shared_memory_files() <= in_shm
