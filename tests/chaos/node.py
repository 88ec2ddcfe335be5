"""The node under test: its options, what its status says, and its way back to health."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import Any

import psutil

from albireo.client import AlbireoError, AsyncClient
from albireo.node.demo_model import fetch_demo_model
from albireo.node.operations import Order, give_order
from albireo.node.options import NodeOptions, OptionError

from .sight import CHUNK, MAX_NUM_SEQS

STEP_TIMEOUT_S = 2.0
_STATUS_S = 3.0
_POLL_S = 0.05

Tree = dict[str, Any]


def options(
    model: str, journal: str | None = None, step_timeout_s: float = STEP_TIMEOUT_S
) -> NodeOptions:
    """Two groups with few slots; hangs are found soon, nothing is given up."""
    return NodeOptions(
        name=f"chaos-{os.getpid()}", model=model, served_model_name="m", groups=(1, 1),
        device="cpu", dtype="float32", batch_invariant=True, max_num_seqs=MAX_NUM_SEQS, threads=1,
        max_num_batched_tokens=CHUNK, max_model_len=512, enable_prefix_caching=False,
        kv_cache_gib=0.25, http="127.0.0.1:0", step_timeout_s=step_timeout_s,
        max_failovers=1_000_000, max_group_restarts=1_000_000, journal=journal,
        journal_max_mib=16,
    )  # fmt: skip


def model_path(name: str) -> str:
    """Of what --model says; the demo model is fetched."""
    if name != "demo":
        return name
    return str(fetch_demo_model(print))


async def status(node: str) -> Tree | None:
    """The status tree; None while nobody answers."""
    try:
        async with asyncio.timeout(_STATUS_S), await AsyncClient.connect(node=node) as client:
            return await client.status()
    except (AlbireoError, OSError, TimeoutError):
        return None


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Health:
    """pids: of every process that ever was."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._orders: dict[int, asyncio.Task[None]] = {}
        self.pids: set[int] = set()

    async def whole(self, within_s: float) -> Tree | None:
        """Waits until all that status tells is ready; the tree that says so, or None.

        A group that has died often would wait before it starts again: it is asked not to.
        """
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            tree = await status(self._node)
            if tree is not None:
                self.pids |= {actor["pid"] for actor in tree["actors"]}
                away = [each["group"] for each in tree["groups"] if each["state"] != "ready"]
                if not away and all(
                    actor["state"] == "ready" and alive(actor["pid"]) for actor in tree["actors"]
                ):
                    return tree
                for group in away:
                    self._hurry(group)
            await asyncio.sleep(_POLL_S)
        return None

    async def close(self) -> None:
        await asyncio.gather(*self._orders.values())

    def _hurry(self, group: int) -> None:
        before = self._orders.get(group)
        if before is None or before.done():
            order = Order(action="start", group=group, timeout_s=0.0)
            self._orders[group] = asyncio.create_task(self._give(order))

    async def _give(self, order: Order) -> None:
        """Where it runs again already, or has not been torn down yet, it says so."""
        with contextlib.suppress(OptionError, OSError):
            await asyncio.to_thread(list, give_order(self._node, order))
