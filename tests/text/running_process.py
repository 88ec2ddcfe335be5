"""Runs a process's main in a thread of the test, with its real sockets around it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from albireo.ipc.config import ActorSpec
from albireo.ipc.link import Hub, Spoke

from .. import specs
from .test_chat_template import MISTRAL
from .tiny_tokenizers import byte_level, text_model

MODEL = text_model(byte_level(), chat_template=MISTRAL, named_tokens={"bos_token": "<|begin|>"})
DEADLINE_S = 10.0


class StopEvent(threading.Event):
    """Notes that somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.is_awaited = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.is_awaited.set()
        return super().wait(timeout)


class FakeActor:
    """The part of ipc.actor.Actor that the processes use, without its process."""

    def __init__(self, spec: ActorSpec) -> None:
        self.spec = spec
        self.stopping = StopEvent()
        self.stop_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.ping_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.is_ready = threading.Event()
        self.is_busy = False

    def ready(self) -> None:
        self.is_ready.set()

    def answer_ping(self, step: int = 0) -> None:
        pass

    @contextmanager
    def busy(self, at_most_s: float) -> Iterator[None]:
        self.is_busy = True
        yield
        self.is_busy = False

    def stop(self) -> None:
        self.stopping.set()
        os.eventfd_write(self.stop_fd, 1)


def actor_spec(directory: Path, role: str, **changes: Any) -> ActorSpec:
    """changes: of the engine."""
    model = msgspec.structs.replace(
        specs.MODEL, vocab_size=MODEL.vocab_size + 8, eos_token_ids=(1,), bos_token_id=0
    )
    engine = msgspec.structs.replace(
        specs.ENGINE, **{"num_blocks": 8, "step_timeout_s": 5.0, "sim_step_ms": 1.0} | changes
    )
    return ActorSpec(
        role=role, name=role, node="test", incarnation=3, runtime_dir=str(directory), threads=1,
        log_level="warning", model=model, engine=engine, group=0, rank=0,
    )  # fmt: skip


def arrived(link: Hub[Any] | Spoke[Any]) -> list[Any]:
    """The messages that are there within a moment, without their senders."""
    link.socket.poll(100)
    return [item[1] if isinstance(item, tuple) else item for item in link.drain()]


def receive(link: Hub[Any] | Spoke[Any], count: int = 1) -> list[Any]:
    """The next messages, which must be `count`."""
    received: list[Any] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(received) < count:
        assert time.monotonic() < deadline, f"got only {received}"
        received += arrived(link)
    assert len(received) == count, f"got more: {received}"
    return received


class Running:
    """A process's main in a thread."""

    def __init__(self, main: Callable[..., None], actor: FakeActor, fds: dict[str, int]) -> None:
        self.failure: BaseException | None = None
        self._main = lambda: main(actor, fds, MODEL)
        self._actor = actor
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._main()
        except BaseException as error:
            self.failure = error

    def wait_for_end(self) -> None:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def stop(self) -> None:
        """Asks it to stop; it must do so in order."""
        self._actor.stop()
        self.wait_for_end()
        assert self.failure is None, self.failure
