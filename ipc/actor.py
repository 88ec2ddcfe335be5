"""What every actor process has in common: it cannot outlive its supervisor.

Before an actor does anything slow it sets a death signal and starts a thread
on its control socket, a SOCK_SEQPACKET pair whose other end the supervisor
holds: end of file there means that the supervisor is gone, and the actor with
it.  On the same socket the actor reports its phases, readiness or failure,
hears that it should stop, and is asked whether its main loop still goes round.

SIGUSR1 writes the stacks of all its threads to the log, whatever they are doing.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from .config import ActorSpec

if TYPE_CHECKING:
    import asyncio

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_libc = ctypes.CDLL(None, use_errno=True)

EXIT_ORPHANED = 70
EXIT_FAILED = 71
_GC_THRESHOLDS = (20_000, 20, 20)


NUM_BLOCKS = "num_blocks"
"""In a GPU worker's detail: KV blocks that it has memory for."""
SWAP_BLOCK_NS = "swap_block_ns"
"""In a worker's detail: what the copy of a KV block to host memory takes, where there is some."""
ALL_REDUCE_US = "all_reduce_us"
"""In a worker's detail: microseconds of a sum over all ranks by its bytes, as text."""


class Phase(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """What a starting process is doing now, for the start-up display."""

    text: str


class Ready(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The process can work.

    detail: what it has found out of itself.  phases_s: what it did until then, in seconds.
    """

    detail: dict[str, Any]
    phases_s: dict[str, float]


class Fatal(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The process gives up; the text is for the user.  hung: because another one hangs."""

    message: str
    hung: bool = False


class Pong(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The main loop has come round since a Ping.  step: what it is at; 0 = it has none."""

    step: int


class Stop(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Leave in order, soon."""


class Ping(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The main loop is to answer with a Pong."""


FromActor = Phase | Ready | Fatal | Pong
_from_supervisor: msgspec.msgpack.Decoder[Stop | Ping] = msgspec.msgpack.Decoder(Stop | Ping)
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
    stop; `stopping` is the same as an event.  `ping_fd` is one that becomes
    readable when the main loop has to call answer_ping().  `detail`: what the
    supervisor shall know of this process when it is ready.
    """

    def __init__(self, spec: ActorSpec, fds: Mapping[str, int]) -> None:
        self.spec = spec
        self.stopping = threading.Event()
        self.stop_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.ping_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.detail: dict[str, Any] = {}
        self._phases_s: dict[str, float] = {}
        self._phase = ""
        self._phase_began_s = time.monotonic()
        self._pinged = False
        self._answering = threading.Lock()
        self._busy_until_s = 0.0
        self._encoder = msgspec.msgpack.Encoder()
        self._control = socket.socket(fileno=fds["control"])
        name_process(f"alb {spec.name}")
        logging.basicConfig(
            level=spec.log_level.upper(),
            format=f"%(asctime)s {spec.name} %(levelname)s %(message)s",
            force=True,
        )
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        # Ctrl-C reaches the whole foreground group; stopping is the supervisor's decision.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Thread(target=self._watch_supervisor, name="control", daemon=True).start()

    def phase(self, text: str) -> None:
        """Reports what begins now, and keeps the time of what ends with it.

        What follows a colon is how far it is: not another phase.
        """
        self._end_phase(text)
        self._tell(Phase(text))

    def _end_phase(self, text: str = "") -> None:
        now_s = time.monotonic()
        if self._phase:
            before_s = self._phases_s.get(self._phase, 0.0)
            self._phases_s[self._phase] = round(before_s + now_s - self._phase_began_s, 3)
        self._phase, self._phase_began_s = text.partition(":")[0], now_s

    def ready(self) -> None:
        """Reports readiness.  What was made until now lives as long as the process, so that the
        garbage collector need not look through it again, for milliseconds, in the middle of a
        step.  The young generation has room then for the pieces of several steps, which die with
        them."""
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        self._end_phase()
        self._tell(Ready(self.detail, self._phases_s))

    def answer_ping(self, step: int = 0) -> None:
        """Called by the main loop; does nothing unless it was asked.  step: what it is at."""
        if self._pinged:
            with self._answering:
                if self._pinged:
                    self._pinged = False
                    os.eventfd_read(self.ping_fd)
                    self._tell(Pong(step))

    @contextmanager
    def busy(self, at_most_s: float) -> Iterator[None]:
        """Within, the control thread answers for the main loop, for so long: where one piece of
        work may take more than a step.  A process that is stopped, or whose interpreter is, still
        does not answer."""
        self._busy_until_s = time.monotonic() + at_most_s
        self.answer_ping()  # one that came before is nobody else's to answer
        try:
            yield
        finally:
            self._busy_until_s = 0.0

    def fatal(self, message: str, *, hung: bool = False) -> None:
        """Reports the end of this process and leaves it; hung: because another one hangs."""
        try:
            logging.error("%s", message)
            self._tell(Fatal(message, hung))
            logging.shutdown()
        finally:  # also where there is no memory to say it
            os._exit(EXIT_FAILED)

    def end_without_memory(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on a callback of the loop that finds no memory ends this process: what it did
        is half done, and the next process is told what to do."""

        def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            if isinstance(context.get("exception"), MemoryError):
                self.fatal("there is no memory left")
            loop.default_exception_handler(context)

        loop.set_exception_handler(handle)

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
            if isinstance(_from_supervisor.decode(payload), Ping):
                os.eventfd_write(self.ping_fd, 1)
                self._pinged = True
                if time.monotonic() < self._busy_until_s:
                    self.answer_ping()
            else:
                self.stopping.set()
                os.eventfd_write(self.stop_fd, 1)
