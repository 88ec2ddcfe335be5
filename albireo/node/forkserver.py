"""The fork server: loads once, then forks every actor of the node.

Importing PyTorch and loading a model takes seconds.  The fork server does both
once, in a process with a single thread, and forks router, tokenizer,
gateways, schedulers, detokenizers and workers from it: they start in milliseconds, share
the weights' memory, and a dead group is back at once.  (On CUDA workers load the
weights, each its share.)  Nothing here, and nothing it imports or loads, may
start a thread or make a CUDA context.

An actor is forked twice, so that it becomes a child of the supervisor (a
subreaper): the supervisor can wait for it, and the actor lives on when the
fork server dies.  Its understudy, a fork of itself, then takes its place with
everything in memory.

    supervisor -> fork server   Load, then Fork | ForkUnderstudy + descriptors (SCM_RIGHTS)
    fork server -> supervisor   Phase..., Loaded | Fatal, then Forked | NotForked
"""

from __future__ import annotations

import errno
import faulthandler
import gc
import importlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from albireo.ipc.actor import Actor, Fatal, Phase, die_with_parent, name_process

from .fork_protocol import (
    MAX_FDS,
    MAX_MESSAGE_BYTES,
    Fork,
    Forked,
    ForkUnderstudy,
    Load,
    Loaded,
    NotForked,
    encode,
    to_fork_server,
)

_ENTRY_POINTS = {
    "router": "albireo.router.process",
    "tokenizer": "albireo.workers.tokenizer.process",
    "gateway": "albireo.gateway.process",
    "scheduler": "albireo.scheduler.process",
    "detokenizer": "albireo.workers.detokenizer.process",
    "worker": "albireo.workers.engine.process",
}


class _Inheritance:
    """What forked actors find in their memory: text model, tokens for grammars, weights."""

    def __init__(self) -> None:
        self.text: Any = None
        self.vocabulary: Any = None
        self.model: Any = None

    def arguments(self, role: str) -> tuple[Any, ...]:
        if role == "tokenizer":
            return self.text, self.vocabulary
        if role == "detokenizer":
            return (self.text,)
        if role == "worker":
            return self.model, self.vocabulary
        return ()


def main() -> None:
    """Entry point of the process: argv[1] is the control socket, argv[2] the supervisor's pid."""
    supervisor = int(sys.argv[2])
    die_with_parent(supervisor)
    name_process("alb forkserver")
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    # Ctrl-C reaches the whole foreground group; stopping is the supervisor's decision.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    inheritance = _Inheritance()
    try:
        _serve(control, supervisor, inheritance)
    except Exception as error:
        traceback.print_exc()
        control.send(encode(Fatal(_for_user(error))))
        sys.exit(1)


def _serve(control: socket.socket, supervisor: int, inheritance: _Inheritance) -> None:
    while True:
        payload, fds, _, _ = socket.recv_fds(control, MAX_MESSAGE_BYTES, MAX_FDS)
        if not payload:
            return
        message = to_fork_server.decode(payload)
        if isinstance(message, Load):
            loaded = _load(message, inheritance, lambda text: control.send(encode(Phase(text))))
            gc.collect()
            gc.freeze()
            control.send(encode(loaded))
            continue
        name, life = _next_life(message, fds, supervisor, inheritance)
        answer: Forked | NotForked
        try:
            answer = Forked(name, _fork_twice(life, control, supervisor))
        except OSError as error:
            answer = NotForked(name, str(error))
        for fd in fds:
            os.close(fd)
        control.send(encode(answer))


def _next_life(
    message: Fork | ForkUnderstudy, fds: list[int], supervisor: int, inheritance: _Inheritance
) -> tuple[str, Callable[[], None]]:
    """What a forked process is called, and what it is to do."""
    if isinstance(message, Fork):
        named = dict(zip(message.fd_names, fds, strict=True))
        return message.spec.name, lambda: _run_actor(message, named, inheritance)

    def understudy() -> None:
        name_process("alb understudy")
        _serve(socket.socket(fileno=fds[0]), supervisor, inheritance)

    return "understudy", understudy


def _load(load: Load, inheritance: _Inheritance, phase: Any) -> Loaded:
    """Imports and loads everything that actors need; says what it does through `phase`."""
    from .preload import load_everything

    everything = load_everything(load, phase)
    loaded, inheritance.text, inheritance.vocabulary, inheritance.model = everything
    for role, module in _ENTRY_POINTS.items():
        if role != "gateway" or load.gateways:
            importlib.import_module(module)
    return loaded


def _fork_twice(life: Callable[[], None], control: socket.socket, supervisor: int) -> int:
    """Forks a child of the supervisor that lives `life`; returns its pid.

    Raises OSError where the system has no room for one more process.
    """
    read_end, write_end = os.pipe()
    with open(read_end, "rb") as reader, open(write_end, "wb", buffering=0) as writer:
        middle = os.fork()
        if middle == 0:
            # Whatever happens: this copy of the fork server must not go on as another one.
            try:
                told = _fork_or_errno()
                if told == 0:
                    for each in (reader, writer, control):
                        each.close()
                    _live(life, supervisor)
                writer.write(told.to_bytes(4, "little", signed=True))
            finally:
                os._exit(0)
        writer.close()
        told = int.from_bytes(reader.read(4), "little", signed=True)
    os.waitpid(middle, 0)
    if told <= 0:
        why = os.strerror(-told) if told else "the process that was to fork it has died"
        raise OSError(-told, why)
    return told


def _fork_or_errno() -> int:
    """As os.fork(); -errno where that fails."""
    try:
        return os.fork()
    except OSError as error:
        return -(error.errno or errno.EAGAIN)


def _live(life: Callable[[], None], supervisor: int) -> None:
    """The whole life of a forked process; does not return."""
    status = 1
    try:
        _wait_for_parent(supervisor)
        die_with_parent(supervisor)
        life()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run_actor(fork: Fork, fds: dict[str, int], inheritance: _Inheritance) -> None:
    """An actor's main function; whatever leaves it is reported as the actor's last words."""
    actor = Actor(fork.spec, fds)
    try:
        entry = importlib.import_module(_ENTRY_POINTS[fork.spec.role])
        entry.main(actor, fds, *inheritance.arguments(fork.spec.role))
    except Exception as error:
        traceback.print_exc()
        actor.fatal(_for_user(error))


def _wait_for_parent(supervisor: int) -> None:
    """The middle process is about to exit; until then it is our parent."""
    deadline = time.monotonic() + 5.0
    while os.getppid() != supervisor and time.monotonic() < deadline:
        time.sleep(0.0002)


def _for_user(error: Exception) -> str:
    return f"{error}" if str(error) else type(error).__name__


if __name__ == "__main__":
    main()
