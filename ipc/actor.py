"""What every actor process has in common: it cannot outlive its supervisor.

Before an actor does anything slow it sets a death signal and starts a thread
on its control socket, a SOCK_SEQPACKET pair whose other end the supervisor
holds: end of file there means that the supervisor is gone, and the actor with
it.  On the same socket the actor reports its phases, readiness or failure, and
hears that it should stop.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Mapping
from typing import Any

import msgspec

from .config import ActorSpec

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_libc = ctypes.CDLL(None, use_errno=True)

EXIT_ORPHANED = 70
EXIT_FAILED = 71


class Phase(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """What a starting process is doing now, for the start-up display."""

    text: str


class Ready(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The process can work.  `detail` is for the role's own use."""

    detail: dict[str, Any]


class Fatal(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The process gives up; the text is for the user."""

    message: str


class Stop(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Leave in order, soon."""


FromActor = Phase | Ready | Fatal
_from_supervisor = msgspec.msgpack.Decoder(Stop)
from_actor: msgspec.msgpack.Decoder[FromActor] = msgspec.msgpack.Decoder(FromActor)


def die_with_parent(expected_parent: int) -> None:
    """Asks the kernel for SIGKILL when the parent dies; exits if it is dead already."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != expected_parent:
        os._exit(EXIT_ORPHANED)


def name_process(name: str) -> None:
    """Shows `name` in ps and top (the kernel keeps 15 characters)."""
    _libc.prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)


class Actor:
    """The process's own main object: identity, control socket, stop request.

    `stop_fd` is an eventfd that becomes readable when the supervisor asks to
    stop; `stopping` is the same as an event.
    """

    def __init__(self, spec: ActorSpec, fds: Mapping[str, int]) -> None:
        self.spec = spec
        self.stopping = threading.Event()
        self.stop_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._encoder = msgspec.msgpack.Encoder()
        self._control = socket.socket(fileno=fds["control"])
        name_process(f"alb {spec.name}")
        logging.basicConfig(
            level=spec.log_level.upper(),
            format=f"%(asctime)s {spec.name} %(levelname)s %(message)s",
            force=True,
        )
        # Ctrl-C reaches the whole foreground group; stopping is the supervisor's decision.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Thread(target=self._watch_supervisor, name="control", daemon=True).start()

    def phase(self, text: str) -> None:
        self._tell(Phase(text))

    def ready(self, **detail: Any) -> None:
        """Reports readiness.  What was made until now lives as long as the process, so that the
        garbage collector need not look through it again, for milliseconds, in the middle of a
        step."""
        gc.collect()
        gc.freeze()
        self._tell(Ready(detail))

    def fatal(self, message: str) -> None:
        """Reports the end of this process and leaves it."""
        logging.error("%s", message)
        self._tell(Fatal(message))
        logging.shutdown()
        os._exit(EXIT_FAILED)

    def _tell(self, message: FromActor) -> None:
        try:
            self._control.send(self._encoder.encode(message))
        except OSError:
            os._exit(EXIT_ORPHANED)

    def _watch_supervisor(self) -> None:
        while True:
            try:
                payload = self._control.recv(1 << 16)
            except OSError:
                payload = b""
            if not payload:
                os._exit(EXIT_ORPHANED)
            _from_supervisor.decode(payload)
            self.stopping.set()
            os.eventfd_write(self.stop_fd, 1)
