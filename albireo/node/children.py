"""The supervisor's side of its processes: the fork server, and the actors it forks.

Both talk over a SOCK_SEQPACKET pair and are watched through a pidfd, so that
waiting for readiness is always also waiting for exit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from albireo.ipc.actor import Fatal, Phase, Ping, Pong, Ready, Stop, from_actor
from albireo.ipc.config import ActorSpec

from .environment import child_environment
from .events import in_words
from .fork_protocol import (
    MAX_MESSAGE_BYTES,
    Fork,
    Forked,
    ForkUnderstudy,
    Load,
    Loaded,
    NotForked,
    encode,
    from_fork_server,
)

log = logging.getLogger(__name__)

_PING_INTERVAL_S = 1.0
_SECOND_LOOK_S = 0.2
_FORK_TIMEOUT_S = 10.0
_STACKS_S = 0.02  # for one process to write them, so that they do not mix


STARVED = (OSError, MemoryError)
"""What starting a process raises where the supervisor has no open files, memory or shared memory
left.  That passes, and is no reason for the node to end."""


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
        """SIGKILL."""
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        """Through the pidfd: never to a process that has taken over the pid."""
        if self._pidfd >= 0:
            signal.pidfd_send_signal(self._pidfd, number)


class ActorProcess(Watched):
    """A forked actor, its readiness, its heartbeat and its last words.

    step: what it was at when it was last heard of.  blames: it ended because another one hangs.
    detail, phases_s: what it said when it was ready.
    """

    def __init__(self, spec: ActorSpec, pid: int, control: socket.socket) -> None:
        super().__init__(spec.name, pid)
        self.spec = spec
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.last_words: str | None = None
        self.blames = False
        self.detail: dict[str, Any] = {}
        self.phases_s: dict[str, float] = {}
        self.step = 0
        self._answered = asyncio.Event()
        self._control = control
        self._listener = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        while payload := await _receive(loop, self._control):
            message = from_actor.decode(payload)
            if isinstance(message, Ready):
                self.detail, self.phases_s = message.detail, message.phases_s
                if self.phases_s:
                    log.info("%s is ready: %s", self.name, in_words(self.phases_s))
                if not self.ready.done():
                    self.ready.set_result(None)
            elif isinstance(message, Fatal):
                self.last_words = message.message
                self.blames = message.hung
            elif isinstance(message, Pong):
                self.step = message.step
                self._answered.set()
            elif isinstance(message, Phase):
                log.info("%s: %s", self.name, message.text)
        self._control.close()

    async def wait_ready(self, timeout_s: float) -> None:
        """Returns when it is ready; raises StartError when it dies before or takes longer."""
        await asyncio.wait(
            (self.ready, self.exited), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if not self.alive:
            raise StartError(self.epitaph())
        if not self.ready.done():
            raise StartError(
                f"{self.name} (pid {self.pid}) is not ready after {timeout_s:g} s "
                "(--start-timeout), and was ended"
            )

    async def silence(self, timeout_s: float) -> None:
        """Asks the actor from time to time, once it is ready; returns when its main loop has not
        answered for timeout_s, or it has ended."""
        await asyncio.wait((self.ready, self.exited), return_when=asyncio.FIRST_COMPLETED)
        while self.alive:
            self._answered.clear()
            if not self._tell(Ping()):
                await self.gone()
                return
            try:
                await asyncio.wait_for(self._answered.wait(), timeout_s)
            except TimeoutError:
                # It may be this process that was held up, and its answer may lie here.
                await asyncio.sleep(_SECOND_LOOK_S)
                if not self._answered.is_set():
                    return
            await asyncio.sleep(min(_PING_INTERVAL_S, timeout_s / 4))

    def why_hung(self, timeout_s: float) -> str:
        """For the user, of one whose silence() has ended."""
        return (
            f"{self.name} (pid {self.pid}) has not answered for {timeout_s:g} s "
            f"(--step-timeout), at step {self.step}: it hangs"
        )

    def epitaph(self) -> str:
        """Why it ended: its own last words, or how it exited."""
        how = self.exited.result() if self.exited.done() else f"{self.name} is alive"
        return f"{how}: {self.last_words}" if self.last_words else how

    def stop(self) -> None:
        """Asks it to leave in order."""
        if not self._tell(Stop()):
            log.debug("%s has gone before it could be asked to stop", self.name)

    def _tell(self, message: Stop | Ping) -> bool:
        try:
            self._control.send(encode(message))
        except OSError:
            return False
        return True


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

        Raises StartError when the fork server has died, or has no room for one more process.
        """
        ours, theirs = seqpacket_pair()
        named = {"control": theirs.fileno(), **fds}
        with contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            pid = await self._ask(Fork(spec, tuple(named)), list(named.values()), theirs, spec.name)
            undo.callback(_end_unwatched, pid)
            actor = ActorProcess(spec, pid, ours)
            undo.pop_all()
        return actor

    async def fork_understudy(self) -> ForkServer:
        """A second fork server with the same in memory.  Raises StartError as fork() does."""
        ours, theirs = seqpacket_pair()
        with contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            pid = await self._ask(ForkUnderstudy(), [theirs.fileno()], theirs, "the understudy")
            undo.callback(_end_unwatched, pid)
            server = ForkServer("the understudy", pid, ours)
            undo.pop_all()
        return server

    async def _ask(
        self, order: Fork | ForkUnderstudy, fds: list[int], theirs: socket.socket, name: str
    ) -> int:
        """Sends an order with its descriptors; the pid of the process that was forked."""
        sent = encode(order)
        if len(sent) > MAX_MESSAGE_BYTES:
            theirs.close()
            raise StartError(
                f"{name} could not be forked: what it is told has {len(sent)} bytes, and "
                f"{MAX_MESSAGE_BYTES} are the limit: give shorter options (--tenant-weights)"
            )
        async with self._turn:
            loop = asyncio.get_running_loop()
            with theirs:
                payload = b""
                try:
                    socket.send_fds(self._control, [sent], fds)
                    async with asyncio.timeout(_FORK_TIMEOUT_S):
                        payload = await _receive(loop, self._control)
                except TimeoutError:
                    log.error("%s has not answered for %g s: it hangs", self.name, _FORK_TIMEOUT_S)
                    await write_stacks([self])
                except STARVED as error:
                    log.error("%s could not be asked: %s", self.name, error)
                if not payload:
                    # An answer that is still to come would be taken for that to the next order.
                    self.kill()
        if not payload:
            raise StartError(f"{name} could not be forked: the fork server has died")
        answer = from_fork_server.decode(payload)
        if isinstance(answer, Forked) and answer.pid > 0:
            return answer.pid
        why = answer.reason if isinstance(answer, NotForked) else answer
        raise StartError(f"{name} could not be forked: {why}")


class Janitor(Watched):
    """The running janitor (janitor.py); it waits as long as this object's pipe end is open."""

    def __init__(self, runtime_dir: Path) -> None:
        with contextlib.ExitStack() as undo:
            read_end, self._pipe = os.pipe2(os.O_CLOEXEC)
            undo.callback(os.close, self._pipe)
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "albireo.node.janitor", str(runtime_dir)],
                    stdin=read_end,
                    start_new_session=True,
                )
            finally:
                os.close(read_end)
            self._process.returncode = 0  # its end is waited for as that of any child here
            undo.callback(_end_unwatched, self._process.pid)
            super().__init__("the janitor", self._process.pid)
            undo.pop_all()

    def release(self) -> None:
        """Lets it see the end of file: it looks after the runtime directory, and leaves."""
        os.close(self._pipe)


def _end_unwatched(pid: int) -> None:
    """Of a child that cannot be watched."""
    assert pid > 0, "0 and below are whole process groups"
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


async def write_stacks(processes: Sequence[Watched]) -> None:
    """Has each process write the stacks of its threads to the log; what cannot, is told of."""
    for each in processes:
        if each.alive:
            with contextlib.suppress(OSError, IndexError):
                state = Path(f"/proc/{each.pid}/stat").read_text().rpartition(")")[2].split()[0]
                log.error("stacks of %s (pid %d, state %s):", each.name, each.pid, state)
            each.signal(signal.SIGUSR1)
            await asyncio.sleep(_STACKS_S)


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
