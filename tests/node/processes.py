"""Looking at a node's processes from outside, and waiting for what should come true."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from albireo.client import AlbireoError, Client


def wait_for(what: str, true: Callable[[], bool], timeout_s: float) -> float:
    """Seconds until `true()`; fails the test, saying `what`, when that takes longer."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)
    return time.monotonic() - began


def alive(pid: int) -> bool:
    """Whether a process exists and is more than a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def status(node: str) -> dict[str, Any]:
    with Client.connect(node=node) as client:
        return client.status()


def pids(node: str) -> dict[str, int]:
    """Actor's name -> pid, of all processes of the node."""
    return {actor["name"]: actor["pid"] for actor in status(node)["actors"]}


def whole(node: str) -> bool:
    """Every actor and group is ready, and a request is answered."""
    try:
        tree = status(node)
        if any(group["state"] != "ready" for group in tree["groups"]):
            return False
        if any(a["state"] != "ready" or not alive(a["pid"]) for a in tree["actors"]):
            return False
        with Client.connect(node=node) as client:
            answer = client.generate([1, 2, 3], max_tokens=2, ignore_eos=True, timeout_s=2)
            return len(answer.token_ids) == 2
    except AlbireoError:
        return False


def shared_memory_files() -> set[str]:
    return set(os.listdir("/dev/shm"))
