"""Payloads of a client's frames become typed messages, or Refusals that say what is wrong."""

from __future__ import annotations

import hashlib
import re

import msgspec

from albireo.ipc.protocol import PROTOCOL_VERSION, ClientMessage, Hello

from .requests import Refusal

MAX_QUOTED_CHARS = 300
SESSION_CHARS = (22, 128)


class _Head(msgspec.Struct):
    """What can be said of any message.  Decoding it also proves that the frame is whole."""

    id: int | None = None


class _HelloHead(msgspec.Struct):
    type: str
    protocol: int = 0


UNDECODABLE = (ValueError, RecursionError, MemoryError)
"""What decoding raises."""

decode_message = msgspec.msgpack.Decoder(ClientMessage).decode
_decode_head = msgspec.msgpack.Decoder(_Head).decode
_decode_hello_head = msgspec.msgpack.Decoder(_HelloHead).decode
_decode_hello = msgspec.msgpack.Decoder(Hello).decode


def request_id_of(payload: bytes) -> int | None:
    """Which request a message is about.  Raises one of UNDECODABLE where it is no whole message."""
    return _decode_head(payload).id


def read_hello(payload: bytes) -> Hello:
    """The first message of a connection.  Raises Refusal."""
    try:
        head = _decode_hello_head(payload)
        if head.type != "hello":
            raise ValueError(f"it is {head.type[:MAX_QUOTED_CHARS]!r}")
        if head.protocol != PROTOCOL_VERSION:
            raise Refusal(
                "protocol",
                f"the client speaks protocol version {head.protocol}, this node version "
                f"{PROTOCOL_VERSION}: use a client library and a node of the same release",
            )
        hello = _decode_hello(payload)
        _check_session(hello.session)
    except UNDECODABLE as error:
        raise Refusal(
            "protocol", f"the first message must be hello: {str(error)[:MAX_QUOTED_CHARS]}"
        ) from None
    return hello


def owner_of(session: str) -> bytes:
    """What is kept of a session's name: who reads the journal cannot take requests over."""
    return hashlib.sha256(session.encode()).digest() if session else b""


def explained(error: BaseException) -> Refusal:
    """For a payload that cannot be decoded, with the field to blame when one is."""
    text = str(error)[:MAX_QUOTED_CHARS]
    if isinstance(error, msgspec.ValidationError):
        field = re.search(r"unknown field `(\w+)`", text) or re.search(
            r"at `\$\.(?:params\.)?(\w+)", text
        )
        param = field[1] if field else None
        return Refusal("invalid_request", f"the message is not valid: {text}", param=param)
    if isinstance(error, UnicodeDecodeError):
        return Refusal("invalid_request", f"a text is not valid UTF-8: {text}")
    if isinstance(error, RecursionError):
        text = "it is nested too deeply"
    return Refusal("invalid_request", f"the frame is not valid msgpack: {text}")


def _check_session(name: str) -> None:
    """Raises ValueError for one that could be guessed."""
    shortest, longest = SESSION_CHARS
    if name and not shortest <= len(name) <= longest:
        raise ValueError(
            f"a session's name has {shortest} to {longest} characters, not {len(name)}"
        )
