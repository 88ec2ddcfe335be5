"""CUDA C++ kernels: compiled by NVRTC at their first use, kept on disk, launched by the driver.

For what Triton cannot say: clusters, copies to several of their programs, the tensor
cores' own instructions.  cuda-bindings, NVIDIA's own package, is all it takes;
where that is not installed there are no such kernels (`available`).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ....ipc.paths import cache_dir

_ARCHITECTURE = "sm_90a"
_CAPABILITY = (9, 0)


@functools.cache
def available(device: torch.device) -> bool:
    """Whether such kernels run on the device: a Hopper GPU, with cuda-bindings installed."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != _CAPABILITY:
        return False
    try:
        import cuda.bindings.driver
        import cuda.bindings.nvrtc  # noqa: F401
    except ImportError:
        return False
    return True


def compiled(source: str, defines: Sequence[str]) -> bytes:
    """The machine code of a source text.  Raises RuntimeError with the compiler's messages."""
    from cuda.bindings import nvrtc

    version = _checked(nvrtc.nvrtcVersion())[1:]
    options = [*(f"-D{define}" for define in defines), f"-arch={_ARCHITECTURE}", "-std=c++17"]
    digest = hashlib.sha256("\0".join([source, *map(str, version), *options]).encode())
    path = cache_dir() / "nvrtc" / f"{digest.hexdigest()[:32]}.cubin"
    if path.exists():
        return path.read_bytes()
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"albireo.cu", 0, [], []))[1]
    result, *_ = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program))[1])
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC: {result.name}\n{log.decode(errors='replace')}")
    code = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program))[1])
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    _keep(path, code)
    return code


def _keep(path: Path, code: bytes) -> None:
    """Whole or not at all: several workers compile at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(code)
    os.replace(name, path)


class CompiledKernel:
    """A kernel on the current device.

    threads, shared_bytes: of a program.  cluster: programs along x, y and z that run side by side.
    """

    def __init__(
        self, code: bytes, name: str, threads: int, shared_bytes: int, cluster: tuple[int, int, int]
    ) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._module = _checked(driver.cuModuleLoadData(code))[1]
        self._function = _checked(driver.cuModuleGetFunction(self._module, name.encode()))[1]
        dynamic = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(self._function, dynamic, shared_bytes))
        ids = driver.CUlaunchAttributeID
        early, together = driver.CUlaunchAttribute(), driver.CUlaunchAttribute()
        early.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        together.id = ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = together.value.clusterDim
        size.x, size.y, size.z = cluster
        self._config = config = driver.CUlaunchConfig()
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.attrs, config.numAttrs = [early, together], 2

    def launch(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """On the current stream; it comes up early, so its kernel keeps the rules of overlap.py.

        arguments: ctypes values, and tensor maps.
        """
        config = self._config
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.hStream = torch.cuda.current_stream().cuda_stream
        places = [a.address if isinstance(a, TensorMap) else ctypes.addressof(a) for a in arguments]
        array = (ctypes.c_void_p * len(places))(*places)
        _checked(self._driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(array), 0))


class TensorMap:
    """Tells the copy engine of a bfloat16 tensor in memory, and of the boxes it takes.

    sizes, box: from the innermost dimension out; strides: bytes, of all but that.  A box's
    rows are 128 bytes, and lie in the tensor cores' swizzled order; outside there are zeros.
    """

    def __init__(
        self, address: int, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]
    ) -> None:
        from cuda.bindings import driver

        size, count = driver.cuuint64_t, driver.cuuint32_t
        self._map = _checked(
            driver.cuTensorMapEncodeTiled(
                driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                len(sizes),
                address,
                [size(each) for each in sizes],
                [size(each) for each in strides],
                [count(each) for each in box],
                [count(1)] * len(sizes),
                driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
                driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
                driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        )[1]
        self.address = int(self._map.getPtr())


def _checked(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call returned.  Raises RuntimeError unless its first part says success."""
    if int(result[0]):
        raise RuntimeError(f"CUDA: {result[0].name}")
    return result
