"""What a figure was measured on, and what a process has used of it."""

from __future__ import annotations

import gc
import os
import platform
from pathlib import Path

from albireo.ipc.cpu_quota import usable_cores

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
