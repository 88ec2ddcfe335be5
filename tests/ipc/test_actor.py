"""An actor's control socket: who answers the supervisor's pings, and when nobody does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import msgspec
import pytest

from albireo.ipc.actor import Phase, Ping, Pong, Ready, from_actor

_ACTOR = """
import os, select, sys, types
from albireo.ipc.actor import Actor

def wait():
    os.read(0, 1)

spec = types.SimpleNamespace(name="test", log_level="warning")
actor = Actor(spec, {"control": int(sys.argv[1])})
actor.phase("loading: layer 1 of 2")
wait()
actor.phase("loading: layer 2 of 2")
actor.phase("warming up")
actor.detail["found"] = {"4096": 2.5}
actor.ready()
wait()  # outside, with a ping on its way
with actor.busy(60.0):
    wait()
with actor.busy(0.0):
    actor.phase("too long")
    wait()
select.select([actor.ping_fd], [], [])
actor.answer_ping(7)
wait()
"""
_SILENCE_S = 0.1


class Supervisor:
    """Of one actor, whose main loop waits for a byte again and again."""

    def __init__(self, control: socket.socket, its: socket.socket) -> None:
        self.began_s = time.monotonic()
        self._control = control
        self._process = subprocess.Popen(
            [sys.executable, "-c", _ACTOR, str(its.fileno())],
            pass_fds=(its.fileno(),), stdin=subprocess.PIPE,
        )  # fmt: skip

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def ping(self) -> None:
        self._control.send(msgspec.msgpack.encode(Ping()))

    def go_on(self) -> None:
        assert self._process.stdin is not None
        os.write(self._process.stdin.fileno(), b"x")

    def hears(self) -> object:
        return from_actor.decode(self._control.recv(1 << 16))

    def hears_nothing(self) -> bool:
        self._control.settimeout(_SILENCE_S)
        try:
            self._control.recv(1 << 16)
        except TimeoutError:
            return True
        finally:
            self._control.settimeout(10.0)
        return False


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mine.settimeout(10.0)
    with mine:
        found = Supervisor(mine, its)
        its.close()
        yield found
        found.end()


def started(supervisor: Supervisor, after_s: float = 0.0) -> Ready:
    """Its first phase lasts until a byte comes, after so long."""
    assert supervisor.hears() == Phase("loading: layer 1 of 2")
    time.sleep(after_s)
    supervisor.go_on()
    assert supervisor.hears() == Phase("loading: layer 2 of 2")
    assert supervisor.hears() == Phase("warming up")
    ready = supervisor.hears()
    assert isinstance(ready, Ready)
    return ready


def test_who_is_ready_says_what_it_did_until_then(supervisor: Supervisor) -> None:
    ready = started(supervisor, _SILENCE_S)
    whole_s = time.monotonic() - supervisor.began_s
    assert ready.detail == {"found": {"4096": 2.5}}
    assert list(ready.phases_s) == ["loading", "warming up"]
    assert _SILENCE_S / 2 < ready.phases_s["loading"] <= whole_s + 1e-3


def test_pings_are_answered_beside_long_work(supervisor: Supervisor) -> None:
    started(supervisor)
    supervisor.ping()
    assert supervisor.hears_nothing()
    supervisor.go_on()
    assert supervisor.hears() == Pong(0)  # to the ping from before
    for _ in range(3):
        supervisor.ping()
        assert supervisor.hears() == Pong(0)
    supervisor.go_on()
    assert supervisor.hears() == Phase("too long")
    supervisor.ping()
    assert supervisor.hears_nothing()  # it has been busy for longer than it said
    supervisor.go_on()
    assert supervisor.hears() == Pong(7)
