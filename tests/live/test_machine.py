"""CPU time from /proc, and NVML as a played driver tells it."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

from albireo.live.machine import GpuReading, Gpus, cpu_seconds


def test_cpu_seconds_are_those_of_the_process() -> None:
    code = "import time\nwhile time.process_time() < 0.2: pass\nprint('done', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        found = cpu_seconds(
            [{"name": "busy", "pid": process.pid}, {"name": "own", "pid": os.getpid()}]
        )
        process.stdin.close()
    assert 0.15 <= found["busy"] < 2.0
    assert abs(found["own"] - sum(os.times()[:2])) < 0.5


def test_a_dead_process_is_left_out() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert cpu_seconds([{"name": "dead", "pid": process.pid}]) == {}


class PlayedNvml:
    """What Gpus asks of pynvml.  missing: functions that this driver does not have."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def __init__(self, missing: tuple[str, ...] = ()) -> None:
        self.opened = 0
        self._missing = missing
        self._answers: dict[str, Any] = {
            "nvmlDeviceGetName": b"NVIDIA H100",
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=87),
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=40 << 30, total=80 << 30),
            "nvmlDeviceGetPowerUsage": 512_300,
            "nvmlDeviceGetTotalEnergyConsumption": 1_500_000,
            "nvmlDeviceGetTemperature": 61,
        }

    def nvmlInit(self) -> None:
        if "nvmlInit" in self._missing:
            raise self.NVMLError("Driver Not Loaded")
        self.opened += 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid == "gone":
            raise self.NVMLError("Not Found")
        return uuid

    def __getattr__(self, name: str) -> Any:
        def ask(*_: Any) -> Any:
            if name in self._missing:
                raise self.NVMLError("Not Supported")
            return self._answers[name]

        return ask


def test_a_reading_in_units() -> None:
    nvml = PlayedNvml()
    gpus = Gpus(nvml)
    assert gpus.read([]) == {} and nvml.opened == 0, "a node without GPUs never opens NVML"
    expected = GpuReading(
        uuid="a", name="NVIDIA H100", utilization=0.87, power_w=512.3, energy_j=1500.0,
        memory_used_bytes=40 << 30, memory_total_bytes=80 << 30, temperature_c=61.0,
    )  # fmt: skip
    assert gpus.read(["a"]) == {"a": expected} == gpus.read(["a"])
    assert nvml.opened == 1 and gpus.why_not == ""


def test_what_a_gpu_does_not_tell_is_none() -> None:
    nvml = PlayedNvml(("nvmlDeviceGetUtilizationRates", "nvmlDeviceGetTotalEnergyConsumption"))
    found = Gpus(nvml).read(["a"])["a"]
    assert found.utilization is None and found.energy_j is None and found.power_w == 512.3


def test_a_gpu_that_is_not_found_is_said() -> None:
    gpus = Gpus(PlayedNvml())
    assert set(gpus.read(["a", "gone"])) == {"a"}
    assert gpus.why_not == "NVML cannot read gone: Not Found"
    assert set(gpus.read(["a"])) == {"a"}
    assert gpus.why_not == "", "said of the last reading alone"


def test_a_driver_that_is_not_there_is_said_once() -> None:
    gpus = Gpus(PlayedNvml(("nvmlInit",)))
    assert gpus.read(["a"]) == {} == gpus.read(["a"])
    assert gpus.why_not == "NVML cannot be opened: Driver Not Loaded"
