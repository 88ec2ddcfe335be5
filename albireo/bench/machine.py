"""What a figure was measured on, and what a process has used of it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import platform
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from albireo.ipc.cpu_quota import usable_cores
from albireo.ipc.garbage import collector_paused
from albireo.ipc.wakefulness import Wakefulness

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def machine() -> dict[str, object]:
    """Processor, cores and the instructions that matter for bfloat16."""
    info = Path("/proc/cpuinfo").read_text()
    fields: dict[str, str] = {}
    for line in info.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set(fields.get("flags", "").split())
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cores": usable_cores(),
        "avx512_bf16": "avx512_bf16" in flags,
        "amx_bf16": "amx_bf16" in flags,
        "python": platform.python_version(),
    }


def cpu_seconds(pid: int) -> float:
    """User and system time that all threads of a process have used so far, in seconds."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def spare_the_collector() -> None:
    """Leaves all that exists out of later garbage collections.

    A full one takes milliseconds in a client's process, which would be measured
    as a pause of the node.
    """
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def collector_at_rest() -> Iterator[None]:
    """As spare_the_collector(), and nothing is collected meanwhile: not even the young objects, for
    0.3 ms after so many tokens, which comes at the same tokens in every round."""
    spare_the_collector()
    with collector_paused():
        yield


@contextlib.asynccontextmanager
async def polling(polls: bool = True) -> AsyncIterator[None]:
    """The loop of this process does not sleep meanwhile, if `polls`.

    What it takes a sleeping client to wake up, 30 to 100 us and now and then several times that,
    is the client's and its machine's, and would be measured as the node's.
    """
    awake = Wakefulness(asyncio.get_running_loop(), math.inf if polls else 0.0)
    awake.stay()
    try:
        yield
    finally:
        awake.rest()
