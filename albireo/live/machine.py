"""CPU time of the node's processes, and what NVML says of its GPUs.

A reading takes some ten microseconds a process and up to a few milliseconds a
GPU: callers with an event loop read in a thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class GpuReading(msgspec.Struct, frozen=True, kw_only=True):
    """Of one GPU; None where it does not tell.

    utilization: share of NVML's last sampling period in which a kernel ran, 0 to 1.
    energy_j: since the driver was loaded; only differences mean something.
    """

    uuid: str
    name: str
    utilization: float | None = None
    power_w: float | None = None
    energy_j: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    temperature_c: float | None = None


def cpu_seconds(actors: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """User and system time of each process of a status tree, by name; dead ones are left out."""
    found = {}
    for actor in actors:
        try:
            with open(f"/proc/{actor['pid']}/stat", "rb") as file:
                text = file.read()
        except OSError:
            continue
        # Behind the command's name, which may hold anything: utime and stime are fields 14 and 15.
        fields = text[text.rindex(b")") + 2 :].split(None, 14)
        found[actor["name"]] = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return found


class Gpus:
    """NVML, opened when a node with GPUs is read for the first time; used by one thread at a time.

    nvml: the pynvml module; None = the installed one.
    why_not: why not all could be read the last time, for the user; "" where it could.
    """

    def __init__(self, nvml: Any = None) -> None:
        self._nvml = nvml
        self._open = False
        self._handles: dict[str, Any] = {}
        self.why_not = ""

    def read(self, uuids: Iterable[str]) -> dict[str, GpuReading]:
        """By UUID; those that NVML does not find are left out."""
        found: dict[str, GpuReading] = {}
        if self._open:
            self.why_not = ""
        for uuid in uuids:
            if not self._ready():
                return {}
            try:
                found[uuid] = self._reading(uuid)
            except self._nvml.NVMLError as error:
                self.why_not = f"NVML cannot read {uuid}: {error}"
        return found

    def _ready(self) -> bool:
        if self._open:
            return True
        if self.why_not:
            return False
        if self._nvml is None:
            try:
                import pynvml
            except ModuleNotFoundError:
                self.why_not = "nvidia-ml-py is not installed: pip install 'albireo[cuda]'"
                return False
            self._nvml = pynvml
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            self.why_not = f"NVML cannot be opened: {error}"
            return False
        self._open = True
        return True

    def _reading(self, uuid: str) -> GpuReading:
        nvml = self._nvml
        handle = self._handles.get(uuid)
        if handle is None:
            handle = self._handles[uuid] = nvml.nvmlDeviceGetHandleByUUID(uuid)
        name = nvml.nvmlDeviceGetName(handle)
        rates = self._told(nvml.nvmlDeviceGetUtilizationRates, handle)
        memory = self._told(nvml.nvmlDeviceGetMemoryInfo, handle)
        power_mw = self._told(nvml.nvmlDeviceGetPowerUsage, handle)
        energy_mj = self._told(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        celsius = self._told(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
        return GpuReading(
            uuid=uuid,
            name=name.decode() if isinstance(name, bytes) else str(name),
            utilization=None if rates is None else rates.gpu / 100,
            power_w=None if power_mw is None else power_mw / 1e3,
            energy_j=None if energy_mj is None else energy_mj / 1e3,
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
            temperature_c=None if celsius is None else float(celsius),
        )

    def _told(self, ask: Callable[..., Any], *args: Any) -> Any:
        """The answer, or None where this GPU has none (MIG, old cards, virtual machines)."""
        try:
            return ask(*args)
        except self._nvml.NVMLError:
            return None
