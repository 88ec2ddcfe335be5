"""The router's sessions with the router behind them: bytes in, and what must hold afterwards.

Groups and tokenizer are played: what they are told they answer at random, or never.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from albireo.ipc.config import TenantConfig
from albireo.ipc.framing import FrameEncoder, FrameSplitter
from albireo.ipc.keys import ApiKeys
from albireo.ipc.messages import (
    Decoded,
    DecodeIds,
    EncodeChat,
    Encoded,
    EncodeText,
    Output,
    Submit,
    TextFailed,
)
from albireo.ipc.protocol import Deltas, Error, RouterMessage, Welcome
from albireo.ipc.timeline import Recorder
from albireo.router.router import Router
from albireo.router.session import Session

from ..router.fakes import make_spec, piece
from .mutate import client_payloads, frames

_HELLO = msgspec.msgpack.encode({"type": "hello", "protocol": 1, "api_key": "fuzz-key"})
_decode = msgspec.msgpack.Decoder(RouterMessage).decode
_MOST_OF_A_SESSION = 200


class _Transport:
    """What a Session needs of one; keeps what was written."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.open = True

    def set_write_buffer_limits(self, high: int) -> None: ...

    def get_extra_info(self, name: str) -> None: ...

    def write(self, data: bytes) -> None:
        self.written += data

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def close(self) -> None:
        self.open = False

    abort = close


class _Logged(logging.Handler):
    """Errors that the router logs: each is a fault that a client has found."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


class RouterTarget:
    """Needs a running event loop.  counts: of what was sent and answered."""

    def __init__(self, runtime_dir: Path, rng: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self._rng = rng
        self._payloads = client_payloads(rng)
        self._logged = _Logged()
        logging.getLogger("albireo.router").addHandler(self._logged)
        spec = make_spec(runtime_dir, num_groups=2, tenants=TenantConfig(max_num_tokens=5000))
        self._router = Router(spec, self._take, Recorder.of({}))
        self._router.texts.joined(b"tokenizer.0", 0)
        for number in range(2):
            self._router.groups.joined(b"g%d.0" % number, number, 0)
        self._encoder = FrameEncoder()
        self._keys = ApiKeys([("fuzz", "fuzz-key")])
        self._submitted: list[Submit] = []
        self._texts: list[Any] = []

    def close(self) -> None:
        logging.getLogger("albireo.router").removeHandler(self._logged)

    def connection(self) -> int:
        """Plays one connection from its beginning to its end; how many messages it took.

        Raises AssertionError for what must not be.
        """
        rng = self._rng
        session = Session(self._router, self._encoder, self._keys if rng.getrandbits(1) else None)
        transport = _Transport()
        session.connection_made(transport)  # type: ignore[arg-type]
        sent = 0
        if rng.random() < 0.9:
            session.data_received(len(_HELLO).to_bytes(4, "little") + _HELLO)
        for _ in range(rng.randrange(1, _MOST_OF_A_SESSION)):
            count = rng.choice((1, 1, 1, 2, 5))
            data = b"".join(frames(rng, self._payloads.draw()) for _ in range(count))
            sent += count
            self._feed(session, data)
            if rng.getrandbits(3) == 0:
                self._play(session)
            if not transport.open:
                self.counts["closed by the router"] += 1
                break
        if rng.random() < 0.5:
            self._play(session)
        self._check_answers(transport)
        session.connection_lost(None)
        self._submitted.clear()
        self._check_rest()
        return sent

    def _feed(self, session: Session, data: bytes) -> None:
        """At once, or in pieces as a network may deliver it."""
        if self._rng.getrandbits(2):
            session.data_received(data)
            return
        place = self._rng.randrange(len(data) + 1)
        session.data_received(data[:place])
        session.data_received(data[place:])

    def _take(self, peer: bytes, message: Any) -> bool:
        if isinstance(message, Submit):
            self._submitted.append(message)
        elif isinstance(message, EncodeText | EncodeChat | DecodeIds):
            self._texts.append(message)
        return True

    def _play(self, session: Session) -> None:
        """Groups and tokenizer answer some of what they have; the client is slow at times."""
        rng = self._rng
        if rng.getrandbits(2) == 0:
            session.pause_writing()
        for message in self._texts:
            self._router.texts.answer(self._text_answer(message))
        self._texts.clear()
        submitted, self._submitted = self._submitted, []
        for group in self._router.groups:
            pieces = [
                piece(each.request, 0, [7], "x", "stop" if rng.getrandbits(1) else None)
                for each in submitted
                if each.request in group.streams
            ]
            if pieces:
                self._router.delivery.output(group, Output(pieces))
        session.resume_writing()

    def _text_answer(self, message: Any) -> Any:
        if self._rng.getrandbits(3) == 0:
            return TextFailed(message.key, "invalid_request", "it cannot be read")
        if isinstance(message, DecodeIds):
            return Decoded(message.key, "text")
        return Encoded(message.key, [5] * self._rng.randrange(1, 9))

    def _check_answers(self, transport: _Transport) -> None:
        for payload in FrameSplitter().feed(bytes(transport.written)):
            message = _decode(payload)
            if isinstance(message, Error):
                assert message.code != "internal", message
                self.counts[f"error {message.code}"] += 1
            elif isinstance(message, Deltas):
                self.counts["deltas"] += len(message.items)
            elif not isinstance(message, Welcome):
                self.counts["other answers"] += 1

    def _check_rest(self) -> None:
        """The client is gone: nothing of it is left anywhere."""
        router = self._router
        assert not self._logged.texts, self._logged.texts
        assert not router.sessions and not router.streams and not router.groups.waiting
        assert not len(router._tenants) and not router._tenants._tokens
        for group in router.groups:
            assert not group.streams and not group.outstanding_tokens
        for message in self._texts:
            router.texts.answer(self._text_answer(message))
        self._texts.clear()
        assert not len(router.texts) and not router.texts._bytes
