"""Tensors whose addresses are there from the beginning, and whose memory comes by and by.

CUDA graphs remember addresses, so what they read must be where it will stay when they are
captured; how much memory is left for it is known afterwards.  A range of addresses costs nothing
(CUDA's virtual memory management: cuMemAddressReserve); memory is put behind its first part, and
behind more of it later.

    memory = GrowingMemory(device, rows=64)
    keys = memory.zeros((100_000, 8, 16, 128), torch.bfloat16)    # the first 64 rows can be used
    memory.grow(memory.rows_in(30 << 30))                         # and now as many as 30 GiB hold
"""

from __future__ import annotations

import bisect
import ctypes
import math
from collections.abc import Callable
from typing import Protocol

import torch

from .libcuda import libcuda

_ON_DEVICE = _PINNED = 1
_READ_WRITE = 3


class AddressRange(Protocol):
    """all: uint8, of which only what has memory may be touched.  granularity: bytes that memory
    comes in."""

    granularity: int
    all: torch.Tensor

    def extend(self, nbytes: int) -> None:
        """There is memory behind the first `nbytes` from now on, a multiple of granularity.

        Raises RuntimeError, with the driver's word for it, where there is none left.
        """
        ...


class GrowingMemory:
    """The tensors that zeros() has made have memory for the same number of rows, the sizes of
    their first dimension.

    rows: at the beginning.  reserve(nbytes, first, device): their addresses, of which the first
    part has memory at once.
    """

    def __init__(
        self,
        device: torch.device,
        rows: int,
        reserve: Callable[[int, int, torch.device], AddressRange] | None = None,
    ) -> None:
        self.rows = rows
        self._device = device
        self._reserve = reserve or (CudaRange if device.type == "cuda" else HostRange)
        self._tensors: list[tuple[torch.Tensor, AddressRange]] = []
        self._most = 0

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Like torch.zeros, but for the rows that have no memory yet."""
        row = math.prod(shape[1:]) * dtype.itemsize
        found = self._reserve(shape[0] * row, min(self.rows, shape[0]) * row, self._device)
        tensor = found.all[: shape[0] * row].view(dtype).view(shape)
        tensor[: self.rows].zero_()
        self._tensors.append((tensor, found))
        self._most = max(self._most, shape[0])
        return tensor

    @property
    def row_bytes(self) -> int:
        """Of one row of all tensors."""
        return sum(tensor.stride(0) * tensor.itemsize for tensor, _ in self._tensors)

    def nbytes(self, rows: int) -> int:
        """Of memory, that so many rows of all tensors take."""
        return sum(_bytes_of(rows, *each) for each in self._tensors)

    def rows_in(self, nbytes: int) -> int:
        """So many rows at most take no more than `nbytes`."""
        return max(0, bisect.bisect_right(range(self._most + 1), nbytes, key=self.nbytes) - 1)

    def grow(self, rows: int) -> None:
        """Memory for so many rows, of which the new ones are zero.  Raises RuntimeError."""
        for tensor, found in self._tensors:
            found.extend(_bytes_of(rows, tensor, found))
            tensor[self.rows : rows].zero_()
        self.rows = max(self.rows, rows)


def _bytes_of(rows: int, tensor: torch.Tensor, found: AddressRange) -> int:
    """What the first rows of a tensor take."""
    return _whole(min(rows, len(tensor)) * tensor.stride(0) * tensor.itemsize, found.granularity)


def _whole(nbytes: int, granularity: int) -> int:
    """Rounded up."""
    return -(-nbytes // granularity) * granularity


class HostRange:
    """Of a device that is the host, whose memory comes as it is written anyway."""

    granularity = 1

    def __init__(self, nbytes: int, first: int, device: torch.device) -> None:
        self.all = torch.zeros(nbytes, dtype=torch.uint8)

    def extend(self, nbytes: int) -> None:
        """See AddressRange."""


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("security", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class CudaRange:
    """Addresses of a GPU, of the current one where `device` has no number; they, and their memory,
    are there until the process ends."""

    def __init__(self, nbytes: int, first: int, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        place = _Location(_ON_DEVICE, index)
        self._properties = _Properties(_PINNED, 0, place)
        self._access = _Access(place, _READ_WRITE)
        granularity = ctypes.c_size_t()
        _call(
            "cuMemGetAllocationGranularity", ctypes.byref(granularity),
            ctypes.byref(self._properties), 0,
        )  # fmt: skip
        self.granularity = granularity.value
        size = _whole(nbytes, self.granularity)
        address = ctypes.c_uint64()
        _call(
            "cuMemAddressReserve", ctypes.byref(address), ctypes.c_size_t(size),
            ctypes.c_size_t(0), ctypes.c_uint64(0), ctypes.c_uint64(0),
        )  # fmt: skip
        self._address = address.value
        self._has = 0
        # PyTorch looks up what an address belongs to: there has to be something.
        self.extend(_whole(max(1, first), self.granularity))
        self.all = torch.as_tensor(_Bytes(self._address, size), device=torch.device("cuda", index))
        assert self.all.data_ptr() == self._address, "a copy"

    def extend(self, nbytes: int) -> None:
        """See AddressRange."""
        if nbytes <= self._has:
            return
        size = ctypes.c_size_t(nbytes - self._has)
        address = ctypes.c_uint64(self._address + self._has)
        handle = ctypes.c_uint64()
        none = ctypes.c_uint64(0)
        _call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(self._properties), none)
        try:
            _call("cuMemMap", address, size, ctypes.c_size_t(0), handle, none)
        finally:
            _call("cuMemRelease", handle)  # What is mapped stays.
        _call("cuMemSetAccess", address, size, ctypes.byref(self._access), ctypes.c_size_t(1))
        self._has = nbytes


class _Bytes:
    """Device memory as PyTorch takes it from others."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3,
        }  # fmt: skip


def _call(name: str, *arguments: object) -> None:
    """Of the driver.  Raises RuntimeError."""
    if error := getattr(libcuda(), name)(*arguments):
        word = ctypes.c_char_p()
        libcuda().cuGetErrorName(error, ctypes.byref(word))
        text = word.value.decode() if word.value else f"error {error}"
        raise RuntimeError(f"{name}: {text}")
