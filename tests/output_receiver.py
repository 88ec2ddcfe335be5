"""A router's end of the way of tokens, without a loop."""

from __future__ import annotations

import os
import socket

from albireo.ipc.framing import FrameSplitter
from albireo.ipc.messages import Output
from albireo.ipc.output_lane import MAX_OUTPUT_BYTES, decode_joined, decode_output

WAIT_S = 10.0


class OutputReceiver:
    """A router's end of the way of tokens, for one detokenizer after the other."""

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.settimeout(WAIT_S)
        self._listener.bind(path)
        self._listener.listen()
        self.connection: socket.socket | None = None

    def accept(self) -> None:
        """Waits for a detokenizer; its Joined has to come before all else."""
        self.connection, _ = self._listener.accept()
        self.connection.settimeout(WAIT_S)
        self._splitter = FrameSplitter(MAX_OUTPUT_BYTES)
        self._payloads: list[bytes] = []
        self.joined = decode_joined(self._payload())

    def next(self) -> Output:
        if self.connection is None:
            self.accept()
        return decode_output(self._payload())

    def silent(self, for_s: float = 0.1) -> bool:
        """Whether nothing comes for that long."""
        if self.connection is None:
            self.accept()
        assert self.connection is not None
        self.connection.settimeout(for_s)
        try:
            self._payloads.insert(0, self._payload())
        except TimeoutError:
            return True
        finally:
            self.connection.settimeout(WAIT_S)
        return False

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
        os.unlink(self._listener.getsockname())
        self._listener.close()

    def arrived(self) -> list[Output]:
        """What one read completes."""
        self._read()
        payloads, self._payloads = self._payloads, []
        return [decode_output(each) for each in payloads]

    def _payload(self) -> bytes:
        while not self._payloads:
            self._read()
        return self._payloads.pop(0)

    def _read(self) -> None:
        assert self.connection is not None
        data = self.connection.recv(1 << 16)
        assert data, "the detokenizer has closed its end"
        self._payloads += self._splitter.feed(data)
