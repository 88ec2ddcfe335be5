"""The supervisor's side of its processes: the fork server, and the actors it forks.

Both talk over a SOCK_SEQPACKET pair and are watched through a pidfd, so that
waiting for readiness is always also waiting for exit.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from albireo.ipc.actor import Fatal, Phase, Ready, Stop, from_actor
from albireo.ipc.config import ActorSpec

from .environment import child_environment
from .fork_protocol import (
    MAX_MESSAGE_BYTES,
    Fork,
    Forked,
    ForkUnderstudy,
    Load,
    Loaded,
    encode,
    from_fork_server,
)

log = logging.getLogger(__name__)


class StartError(RuntimeError):
    """A process could not start; the text is for the user."""


def seqpacket_pair() -> tuple[socket.socket, socket.socket]:
    """(ours, theirs); ours is non-blocking."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs


class Watched:
    """A child process whose exit is a future: the wait status, with a text for people."""

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self.pid = pid
        loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[str] = loop.create_future()
        self._pidfd = os.pidfd_open(pid)
        loop.add_reader(self._pidfd, self._on_exit)

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with status {code}"
        self.exited.set_result(f"{self.name} (pid {self.pid}) {how}")

    async def gone(self) -> str:
        """Waits for the end; says how it came.  A waiter that is cancelled harms no other."""
        return await asyncio.shield(self.exited)

    @property
    def alive(self) -> bool:
        return not self.exited.done()

    def kill(self) -> None:
        """SIGKILL, through the pidfd: never to a process that has taken over the number."""
        if self._pidfd >= 0:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


class ActorProcess(Watched):
    """A forked actor, its readiness and its last words."""

    def __init__(self, spec: ActorSpec, pid: int, control: socket.socket) -> None:
        super().__init__(spec.name, pid)
        self.spec = spec
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.last_words: str | None = None
        self._control = control
        self._listener = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        while payload := await _receive(loop, self._control):
            message = from_actor.decode(payload)
            if isinstance(message, Ready):
                if not self.ready.done():
                    self.ready.set_result(None)
            elif isinstance(message, Fatal):
                self.last_words = message.message
            elif isinstance(message, Phase):
                log.info("%s: %s", self.name, message.text)
        self._control.close()

    async def wait_ready(self) -> None:
        """Returns when the actor is ready; raises StartError when it dies before."""
        await asyncio.wait((self.ready, self.exited), return_when=asyncio.FIRST_COMPLETED)
        if not self.ready.done():
            raise StartError(self.epitaph())

    def epitaph(self) -> str:
        """Why it ended: its own last words, or how it exited."""
        how = self.exited.result() if self.exited.done() else f"{self.name} is alive"
        return f"{how}: {self.last_words}" if self.last_words else how

    def stop(self) -> None:
        """Asks it to leave in order."""
        try:
            self._control.send(encode(Stop()))
        except OSError:
            log.debug("%s has gone before it could be asked to stop", self.name)


class ForkServer(Watched):
    """A running fork server; start() makes one, fork_understudy() another of its kind."""

    def __init__(self, name: str, pid: int, control: socket.socket) -> None:
        super().__init__(name, pid)
        self._control = control
        self._turn = asyncio.Lock()

    @classmethod
    async def start(cls, load: Load, on_phase: Callable[[str], None]) -> tuple[ForkServer, Loaded]:
        """Starts one and waits until everything is loaded.

        Raises StartError with the fork server's own explanation.
        """
        ours, theirs = seqpacket_pair()
        process = subprocess.Popen(
            [
                sys.executable, "-P", "-m", "albireo.node.forkserver",
                str(theirs.fileno()), str(os.getpid()),
            ],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            env=child_environment(load.device),
        )  # fmt: skip
        theirs.close()
        process.returncode = 0  # its end is waited for as that of any child here
        server = cls("the fork server", process.pid, ours)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(ours, encode(load))
        while True:
            payload = await _receive(loop, ours)
            if not payload:
                how = await server.gone()
                raise StartError(f"{how} while it was loading; `albireo node logs` may tell why")
            message = from_fork_server.decode(payload)
            if isinstance(message, Phase):
                on_phase(message.text)
            elif isinstance(message, Fatal):
                raise StartError(message.message)
            elif isinstance(message, Loaded):
                return server, message

    async def fork(self, spec: ActorSpec, fds: Mapping[str, int]) -> ActorProcess:
        """Forks an actor that inherits `fds` (kept open here).

        Raises StartError when the fork server has died.
        """
        ours, theirs = seqpacket_pair()
        named = {"control": theirs.fileno(), **fds}
        pid = await self._ask(Fork(spec, tuple(named)), list(named.values()), theirs, spec.name)
        return ActorProcess(spec, pid, ours)

    async def fork_understudy(self) -> ForkServer:
        """A second fork server with the same in memory.  Raises StartError as fork() does."""
        ours, theirs = seqpacket_pair()
        pid = await self._ask(ForkUnderstudy(), [theirs.fileno()], theirs, "the understudy")
        return ForkServer("the understudy", pid, ours)

    async def _ask(
        self, order: Fork | ForkUnderstudy, fds: list[int], theirs: socket.socket, name: str
    ) -> int:
        """Sends an order with its descriptors; the pid of the process that was forked."""
        async with self._turn:
            loop = asyncio.get_running_loop()
            with theirs:
                try:
                    socket.send_fds(self._control, [encode(order)], fds)
                    payload = await _receive(loop, self._control)
                except OSError:
                    payload = b""
        if not payload:
            raise StartError(f"{name} could not be forked: the fork server has died")
        forked = from_fork_server.decode(payload)
        if not isinstance(forked, Forked):
            raise StartError(f"{name} could not be forked: {forked}")
        return forked.pid


class Janitor(Watched):
    """The running janitor (janitor.py); it waits as long as this object's pipe end is open."""

    def __init__(self, runtime_dir: Path) -> None:
        read_end, self._pipe = os.pipe2(os.O_CLOEXEC)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "albireo.node.janitor", str(runtime_dir)],
            stdin=read_end,
            start_new_session=True,
        )
        os.close(read_end)
        super().__init__("the janitor", self._process.pid)

    def release(self) -> None:
        """Lets it see the end of file: it looks after the runtime directory, and leaves."""
        os.close(self._pipe)


async def _receive(loop: asyncio.AbstractEventLoop, control: socket.socket) -> bytes:
    try:
        return await loop.sock_recv(control, MAX_MESSAGE_BYTES)
    except OSError:
        return b""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
