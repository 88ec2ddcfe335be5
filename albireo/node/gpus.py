"""The GPUs of this machine as NVML reports them.

The supervisor asks NVML, never CUDA: a CUDA context takes memory and must not
exist before a fork.  GPUs are named by their UUIDs, which CUDA_VISIBLE_DEVICES
takes too, so that no numbering can be mistaken for another.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import msgspec

from albireo.workers.kernels.cuda.needs import CAPABILITY, has_bindings

from .options import OptionError


class Gpu(msgspec.Struct, frozen=True):
    """Memory in bytes; free: at the time of asking.

    capability: CUDA's, major and minor.  cores: of all multiprocessors.  0 where NVML does not say.
    """

    uuid: str
    name: str
    total: int
    free: int
    capability: tuple[int, int] = (0, 0)
    cores: int = 0

    def describe_capability(self) -> str:
        """For an error."""
        if not any(self.capability):
            return f"the driver does not say what {self.name} has"
        return f"{self.name} has {'.'.join(map(str, self.capability))}"


def needs_bfloat16_on_gpu(device: str, dtype: str) -> str:
    """What follows the name of an option that does, in an error; "" where it has it."""
    if device != "cuda":
        return f"is for GPUs, and --device is {device}"
    if dtype != "bfloat16":
        return f"is for bfloat16, and --dtype is {dtype}"
    return ""


def needs_cuda_cpp(gpus: Sequence[Gpu]) -> str:
    """As needs_bfloat16_on_gpu, of an option whose kernels are of CUDA C++ for Hopper."""
    for gpu in gpus:
        if gpu.capability != CAPABILITY:
            return (
                "needs GPUs of compute capability 9.0 (H100, H200), and "
                f"{gpu.describe_capability()}"
            )
    if not has_bindings():
        return "needs the package cuda-bindings, which is not installed"
    return ""


def visible_gpus() -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES leaves, in its order; without it all, in NVML's order.

    Raises OptionError when NVML cannot be asked.
    """
    try:
        import pynvml
    except ModuleNotFoundError:
        raise OptionError(
            "--device cuda needs nvidia-ml-py to see the GPUs' memory: pip install 'albireo[cuda]'"
        ) from None
    try:
        pynvml.nvmlInit()
        try:
            found = [_describe(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise OptionError(
            f"--device cuda: NVML finds no usable GPU ({error}); use --device cpu, or check the "
            "driver with nvidia-smi"
        ) from None
    return chosen(found, os.environ.get("CUDA_VISIBLE_DEVICES"))


def chosen(found: Sequence[Gpu], visible: str | None) -> list[Gpu]:
    """The GPUs that `visible` (as CUDA_VISIBLE_DEVICES) names by number or (part of a) UUID."""
    if visible is None:
        return list(found)
    gpus: list[Gpu] = []
    for part in filter(None, (part.strip() for part in visible.split(","))):
        if part.lstrip("-").isdigit():
            index = int(part)
            matching = list(found[index : index + 1]) if index >= 0 else []
        else:
            matching = [gpu for gpu in found if gpu.uuid.startswith(part)]
        if not matching:
            break  # As CUDA does: what follows an unknown entry is invisible too.
        gpus.append(matching[0])
    return gpus


def _describe(nvml: object, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)  # type: ignore[attr-defined]
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)  # type: ignore[attr-defined]
    texts = [
        value.decode() if isinstance(value, bytes) else str(value)
        for value in (
            nvml.nvmlDeviceGetUUID(handle),  # type: ignore[attr-defined]
            nvml.nvmlDeviceGetName(handle),  # type: ignore[attr-defined]
        )
    ]
    major, minor = _asked(nvml, "nvmlDeviceGetCudaComputeCapability", handle) or (0, 0)
    cores = _asked(nvml, "nvmlDeviceGetNumGpuCores", handle) or 0
    return Gpu(
        texts[0], texts[1], int(memory.total), int(memory.free), (int(major), int(minor)),
        int(cores),
    )  # fmt: skip


def _asked(nvml: Any, function: str, handle: object) -> Any:
    """None where this driver or its bindings do not know."""
    try:
        return getattr(nvml, function)(handle)
    except (AttributeError, nvml.NVMLError):
        return None
