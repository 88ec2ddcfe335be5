"""Length-prefixed msgpack frames on a byte stream: a u32, little endian, and the payload."""

from __future__ import annotations

import struct

import msgspec

from .protocol import MAX_FRAME_BYTES

_PREFIX = struct.Struct("<I")


class FrameTooLarge(ValueError):
    """The peer announced a frame above the limit; the connection cannot go on."""


class FrameEncoder:
    """Messages to frames; reuses one buffer, so the result is valid until the next call."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer = bytearray(64 * 1024)

    def encode(self, message: msgspec.Struct) -> bytes:
        self._encoder.encode_into(message, self._buffer, _PREFIX.size)
        _PREFIX.pack_into(self._buffer, 0, len(self._buffer) - _PREFIX.size)
        return bytes(self._buffer)


class FrameSplitter:
    """Bytes as they come to whole payloads.  Raises FrameTooLarge on a bad prefix."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max = max_frame_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Adds data and returns the payloads that are complete now."""
        self._buffer += data
        payloads = []
        at = 0
        end = len(self._buffer)
        while end - at >= _PREFIX.size:
            (length,) = _PREFIX.unpack_from(self._buffer, at)
            if length > self._max:
                raise FrameTooLarge(
                    f"a frame of {length} bytes is announced; the limit is {self._max}"
                )
            start = at + _PREFIX.size
            if end - start < length:
                break
            payloads.append(bytes(self._buffer[start : start + length]))
            at = start + length
        if at:
            del self._buffer[:at]
        return payloads
