"""CUDA C++ kernels: compiled by NVRTC at their first use, kept on disk, launched by the driver.

For what Triton cannot say: clusters, the copy engine's boxes in the tensor cores' order,
the tensor cores' own instructions.  cuda-bindings, NVIDIA's own package, is all it takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ....ipc.paths import cache_dir
from .libcuda import libcuda
from .needs import CAPABILITY, has_bindings

_ARCHITECTURE = "sm_90a"

_MAP_BYTES = 128
"""Of a CUtensorMap, and what it has to be aligned to."""
# CUtensorMapDataType, -Interleave, -Swizzle, -L2promotion and -FloatOOBfill in cuda.h.
_BFLOAT16, _NO_INTERLEAVE, _SWIZZLE_128B, _PROMOTE_256B, _ZEROS_OUTSIDE = 9, 0, 3, 3, 0


class Code(NamedTuple):
    """kept: it was compiled before, and may be damaged."""

    machine: bytes
    kept: bool


def available(device: torch.device) -> bool:
    """Whether it is a Hopper GPU, and there is what compiles for it.  It may still not load."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != CAPABILITY:
        return False
    return has_bindings()


def instructions() -> str:
    """What stands in front of a kernel's text: types, and what several kernels ask of a warp."""
    return Path(__file__).with_name("warp.cu").read_text()


def compiled(source: str, defines: Sequence[str], anew: bool = False) -> Code:
    """The machine code of a source text.  Raises RuntimeError with the compiler's messages.

    anew: what is kept of it is not used.
    """
    from cuda.bindings import nvrtc

    version = _checked(nvrtc.nvrtcVersion())[1:]
    options = [*(f"-D{define}" for define in defines), f"-arch={_ARCHITECTURE}", "-std=c++17"]
    digest = hashlib.sha256("\0".join([source, *map(str, version), *options]).encode())
    path = cache_dir() / "nvrtc" / f"{digest.hexdigest()[:32]}.cubin"
    with contextlib.suppress(OSError):
        if not anew:
            return Code(path.read_bytes(), True)
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
    return Code(code, False)


def _keep(path: Path, code: bytes) -> None:
    """Whole or not at all: several workers compile at the same time.  Without room, not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(code)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise
    except OSError as error:
        logging.warning("a compiled kernel could not be kept: %s", error)


class CompiledKernel:
    """A kernel on the current device.  Raises RuntimeError where it does not compile or load.

    defines, name: its macros, and what it is called in the source.  threads, shared_bytes: of a
    program.  cluster: programs along x, y and z that run side by side.
    """

    def __init__(
        self, source: str, defines: Sequence[str], name: str, threads: int, shared_bytes: int,
        cluster: tuple[int, int, int],
    ) -> None:  # fmt: skip
        from cuda.bindings import driver

        self._driver = driver
        self._module = _loaded(source, defines)
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


def _loaded(source: str, defines: Sequence[str]) -> Any:
    """The module, compiled anew where what was kept is not whole."""
    from cuda.bindings import driver

    code = compiled(source, defines)
    result, module = driver.cuModuleLoadData(code.machine)
    if int(result) and code.kept:
        result, module = driver.cuModuleLoadData(compiled(source, defines, anew=True).machine)
    return _checked((result, module))[1]


class TensorMap:
    """Tells the copy engine of a bfloat16 tensor in memory, and of the boxes it takes.

    sizes, box: from the innermost dimension out; strides: bytes, of all but that.  A box's
    rows are 128 bytes, and lie in the tensor cores' swizzled order; outside there are zeros.
    """

    def __init__(
        self, address: int, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]
    ) -> None:
        # The driver writes it by aligned stores, and objects of Python lie anywhere.
        self._memory = ctypes.create_string_buffer(2 * _MAP_BYTES)
        self.address = -(-ctypes.addressof(self._memory) // _MAP_BYTES) * _MAP_BYTES
        dimensions = len(sizes)
        ones = [1] * dimensions
        result = libcuda().cuTensorMapEncodeTiled(
            ctypes.c_void_p(self.address), _BFLOAT16, dimensions, ctypes.c_void_p(address),
            (ctypes.c_uint64 * dimensions)(*sizes), (ctypes.c_uint64 * (dimensions - 1))(*strides),
            (ctypes.c_uint32 * dimensions)(*box), (ctypes.c_uint32 * dimensions)(*ones),
            _NO_INTERLEAVE, _SWIZZLE_128B, _PROMOTE_256B, _ZEROS_OUTSIDE,
        )  # fmt: skip
        if result:
            raise RuntimeError(
                f"CUDA: no tensor map of {tuple(sizes)}, box {tuple(box)}: error {result}"
            )


def _checked(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call returned.  Raises RuntimeError unless its first part says success."""
    if int(result[0]):
        raise RuntimeError(f"CUDA: {result[0].name}")
    return result
