"""Typed messages between actors over ZeroMQ: a Hub binds, its Spokes connect.

The Hub is a ROUTER with ROUTER_MANDATORY: a send to a peer that is gone, or
that does not read, raises instead of vanishing.  Nothing relies on ZeroMQ's
queues for flow control: every stream of messages is bounded by credits or by
admission, and the high-water mark is far above what these allow.  A message that
the other end would not take raises, too.

Sockets live in the node's runtime directory (0700).  A Spoke's identity names
the actor and its incarnation, so a restarted actor is a new peer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec
import zmq

_HIGH_WATER = 100_000
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_log = logging.getLogger(__name__)

Received = TypeVar("Received")


class PeerGone(ConnectionError):
    """The Hub's peer is not connected (any more)."""


class PeerStuck(ConnectionError):
    """The peer does not read: the high-water mark is reached, so credits were broken."""


class MessageTooLarge(ValueError):
    """ZeroMQ would end the connection at its other end, and the message be lost in silence."""


class _Link(Generic[Received]):
    def __init__(self, kind: int, receives: Any) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.SNDHWM, _HIGH_WATER)
        self._socket.setsockopt(zmq.RCVHWM, _HIGH_WATER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(receives)

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """For zmq.Poller; do not send or receive on it directly."""
        return self._socket

    def fileno(self) -> int:
        """ZeroMQ's descriptor for event loops.

        It is edge-triggered: after any readiness, and after any send, drain().
        """
        return int(self._socket.getsockopt(zmq.FD))

    def close(self) -> None:
        self._socket.close()

    def _encoded(self, message: msgspec.Struct) -> bytes:
        payload = self._encoder.encode(message)
        if len(payload) > MAX_MESSAGE_BYTES:
            raise MessageTooLarge(
                f"{type(message).__name__} of {len(payload)} bytes cannot be sent: "
                f"the limit is {MAX_MESSAGE_BYTES}"
            )
        return payload


class Hub(_Link[Received]):
    """The side that binds; `receives` is the union of messages its peers send."""

    def __init__(self, path: str, receives: Any) -> None:
        super().__init__(zmq.ROUTER, receives)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.bind(f"ipc://{path}")

    def send(self, peer: bytes, message: msgspec.Struct) -> None:
        """Queues a message.  Raises PeerGone, PeerStuck or MessageTooLarge; never blocks."""
        try:
            self._socket.send_multipart((peer, self._encoded(message)), zmq.NOBLOCK)
        except zmq.Again:
            raise PeerStuck(
                f"{peer.decode(errors='replace')} has {_HIGH_WATER} messages unread"
            ) from None
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                raise PeerGone(f"{_name(peer)} is not connected") from None
            raise

    def drain(self) -> Iterator[tuple[bytes, Received]]:
        """All messages that have arrived, with the identity of their sender; never blocks.

        Whoever may open the socket can send here: what is no message is logged and dropped.
        """
        while True:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                peer, payload = parts
                message = self._decoder.decode(payload)
            except (ValueError, RecursionError) as error:
                _log.warning("%r sent what is no message: %s", parts[0][:40], str(error)[:200])
                continue
            yield peer, message


def _name(peer: bytes) -> str:
    return peer.decode(errors="replace")


class Spoke(_Link[Received]):
    """The side that connects; `receives` is the union of messages its Hub sends."""

    def __init__(self, path: str, identity: str, receives: Any) -> None:
        super().__init__(zmq.DEALER, receives)
        self._socket.setsockopt(zmq.IDENTITY, identity.encode())
        # Without backing off: the Hub may start, or start again, at any moment, and what is
        # said meanwhile reaches it with the next attempt.
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self._socket.connect(f"ipc://{path}")

    def send(self, message: msgspec.Struct) -> None:
        """Queues a message, also before the Hub is there; never blocks.

        Raises PeerStuck or MessageTooLarge.
        """
        try:
            self._socket.send(self._encoded(message), zmq.NOBLOCK)
        except zmq.Again:
            raise PeerStuck(f"the hub has {_HIGH_WATER} messages unread") from None

    def drain(self) -> Iterator[Received]:
        """All messages that have arrived; never blocks."""
        while True:
            try:
                payload = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield self._decoder.decode(payload)
