"""Reads a GGUF file: metadata, and where each tensor's bytes are.

    magic "GGUF", version u32, tensors u64, fields u64
    fields    key, type u32, value        strings are a u64 length and bytes
    tensors   name, dims u32, dim u64 ... , type u32, offset u64
    data      from the next multiple of general.alignment

Used by gguf_config.py and gguf_weights.py.  The gguf package's GGUFReader makes
several arrays for every token of the vocabulary (2 s for 49,152); this one only
notes where a field is and decodes it when it is asked for.  The file is mapped,
so a tensor's bytes are read when they are used.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .config import ModelError

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """shape: row-major, as in PyTorch; type: ggml's number; offset: in bytes, in the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


class GGUFFile:
    """One GGUF file; `tensors` by name, fields through `get`.

    Raises ModelError when the file is no GGUF, is damaged, or is one part of several.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                # A private mapping is writable, which numpy and torch want of shared memory.
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot be read: {error}") from error
        if self._bytes[:4] != b"GGUF":
            raise ModelError(
                f"{path}: not a GGUF file: it begins with {self._bytes[:4]!r} in place of b'GGUF'"
            )
        self._fields: dict[str, tuple[int, int]] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, IndexError, OverflowError) as error:
            raise ModelError(
                f"{path}: the header runs past the end of the file, {self.size} bytes ({error}); "
                "the download was cut short: fetch the file again"
            ) from error
        if self.get("split.count", 1) > 1:
            raise ModelError(
                f"{path}: is one of {self.get('split.count')} parts; join them first with "
                "llama-gguf-split --merge"
            )

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self._bytes)

    def get(self, key: str, default: Any = None) -> Any:
        """A field's value: int, float, bool, str, or a list of one of them."""
        if key not in self._fields:
            return default
        try:
            return self._value(*self._fields[key])
        except (struct.error, UnicodeDecodeError, OverflowError) as error:
            raise ModelError(f"{self.path}: field {key} is damaged: {error}") from error

    def data(self, tensor: GGUFTensor, nbytes: int) -> npt.NDArray[np.uint8]:
        """A tensor's bytes, mapped, [nbytes].  Raises ModelError when the file ends before."""
        end = tensor.offset + nbytes
        if end > self.size:
            raise ModelError(
                f"{self.path}: tensor {tensor.name} ends at byte {end}, but the file has "
                f"{self.size}; the download was cut short: fetch the file again"
            )
        return np.frombuffer(self._bytes, np.uint8, nbytes, tensor.offset)

    def _read_header(self) -> None:
        (version,) = _U32.unpack_from(self._bytes, 4)
        if version not in _VERSIONS:
            raise ModelError(
                f"{self.path}: GGUF version {version:#x} is not supported, only little-endian "
                f"{' and '.join(map(str, _VERSIONS))} are; convert the model again"
            )
        num_tensors, num_fields = struct.unpack_from("<QQ", self._bytes, 8)
        at = 24
        for _ in range(num_fields):
            key, at = self._string(at)
            (kind,) = _U32.unpack_from(self._bytes, at)
            self._fields[key] = (kind, at + 4)
            at = self._after(kind, at + 4)
        found = []
        for _ in range(num_tensors):
            name, at = self._string(at)
            (num_dims,) = _U32.unpack_from(self._bytes, at)
            *dims, kind, offset = struct.unpack_from(f"<{num_dims}QIQ", self._bytes, at + 4)
            at += 4 + 8 * num_dims + 12
            found.append((name, tuple(reversed(dims)), kind, offset))
        alignment = self.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ModelError(
                f"{self.path}: general.alignment is {alignment!r}: a whole number above 0 is "
                "needed; the file is damaged: fetch it again"
            )
        start = -(-at // alignment) * alignment
        for name, shape, kind, offset in found:
            self.tensors[name] = GGUFTensor(name, shape, kind, start + offset)

    def _after(self, kind: int, at: int) -> int:
        """Where the value at `at` ends."""
        if kind in _SCALARS:
            return at + struct.calcsize(_SCALARS[kind])
        if kind == _STRING:
            return at + 8 + int(_U64.unpack_from(self._bytes, at)[0])
        element, count = self._array(kind, at)
        at += 12
        if element != _STRING:
            return at + count * struct.calcsize(_SCALARS[element])
        read, data = _U64.unpack_from, self._bytes
        for _ in range(count):
            at += 8 + read(data, at)[0]
        return at

    def _value(self, kind: int, at: int) -> Any:
        if kind in _SCALARS:
            return struct.unpack_from("<" + _SCALARS[kind], self._bytes, at)[0]
        if kind == _STRING:
            return self._string(at)[0]
        element, count = self._array(kind, at)
        at += 12
        if element != _STRING:
            return list(struct.unpack_from(f"<{count}{_SCALARS[element]}", self._bytes, at))
        strings = []
        for _ in range(count):
            text, at = self._string(at)
            strings.append(text)
        return strings

    def _array(self, kind: int, at: int) -> tuple[int, int]:
        """(element type, count) of the array at `at`."""
        if kind != _ARRAY:
            raise ModelError(f"{self.path}: a field of unknown type {kind} at byte {at}")
        element, count = struct.unpack_from("<IQ", self._bytes, at)
        if element != _STRING and element not in _SCALARS:
            raise ModelError(f"{self.path}: an array of unknown type {element} at byte {at}")
        return element, count

    def _string(self, at: int) -> tuple[str, int]:
        (length,) = _U64.unpack_from(self._bytes, at)
        start = at + 8
        if start + length > self.size:
            raise IndexError(f"a string of {length} bytes at byte {at}")
        return self._bytes[start : start + length].decode(), start + length
