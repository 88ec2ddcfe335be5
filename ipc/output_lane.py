"""The way of tokens from a detokenizer to the router, past ZeroMQ: a Unix stream socket.

ZeroMQ hands a message to a thread of its own on either side.  Waking these two is most of what
a token's way through a node takes, and now and then takes several times as long, which a
client sees between two tokens.  Here the detokenizer writes to the socket itself.

The first frame (framing.py) is a Joined, which says who it is; all others are Outputs.  What a
detokenizer has to say besides goes through its Spoke.  The order between the two does not
matter: a request has another number each time that a group is given it, so that an Output
which comes late names nobody.
"""

from __future__ import annotations

import select
import socket

import msgspec

from .framing import FrameEncoder
from .messages import Joined, Output

OUTPUT_BYTES = 1024 * 1024
"""An Output that has so much, as rough_size.py counts, has no room for more: what collects while
a router does not read holds neither process up for long when it does again."""
MAX_OUTPUT_BYTES = 64 * OUTPUT_BYTES
"""No Output comes near it, however rough the count."""


class OutputSender:
    """A detokenizer's end.

    path: the router's socket, which may come and go.  joined: who this is.
    Pollers that wait for fileno() to be readable wait for the time to flush().
    """

    def __init__(self, path: str, joined: Joined) -> None:
        self._path = path
        self._joined = joined
        self._encoder = FrameEncoder()
        self._socket: socket.socket | None = None
        self._unsent = b""
        self._writable = select.epoll()

    def fileno(self) -> int:
        return self._writable.fileno()

    def send(self, output: Output) -> None:
        """Sends; what the socket does not take now is kept for flush().  Never blocks.

        Where no router is, the output is dropped: the one that comes knows none of its requests.
        """
        frame = self._encoder.encode(output)
        if self._unsent:
            self._unsent += frame
        elif not self._sent(frame) and self._connected():
            self._sent(frame)  # The router is another one since the last output.

    def flush(self) -> bool:
        """Sends what is left; False while the router does not read it."""
        if self._unsent:
            self._sent(self._unsent)
        return not self._unsent

    def close(self) -> None:
        self._disconnect()
        self._writable.close()

    def _connected(self) -> bool:
        """Connects; False if no router listens."""
        self._disconnect()
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        try:
            self._socket.connect(self._path)
        except OSError:
            self._disconnect()
            return False
        return self._sent(self._encoder.encode(self._joined))

    def _sent(self, data: bytes) -> bool:
        """Writes, or keeps, all of it; False if there is nobody to read it."""
        if self._socket is None:
            return False
        try:
            written = self._socket.send(data)
        except BlockingIOError:
            written = 0
        except OSError:
            self._disconnect()
            return False
        self._keep(data[written:])
        return True

    def _keep(self, unsent: bytes) -> None:
        assert self._socket is not None
        if unsent and not self._unsent:
            self._writable.register(self._socket, select.EPOLLOUT)
        elif self._unsent and not unsent:
            self._writable.unregister(self._socket)
        self._unsent = unsent

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()  # epoll forgets it
            self._socket = None
        self._unsent = b""


def decode_joined(payload: bytes) -> Joined:
    """The first frame.  Raises msgspec.DecodeError."""
    return _JOINED.decode(payload)


def decode_output(payload: bytes) -> Output:
    """Any other frame.  Raises msgspec.DecodeError."""
    return _OUTPUT.decode(payload)


_JOINED = msgspec.msgpack.Decoder(Joined)
_OUTPUT = msgspec.msgpack.Decoder(Output)
