"""The router as a process of its own, as the fork server starts it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from albireo.ipc.actor import EXIT_ORPHANED, Ready, Stop, from_actor
from albireo.ipc.messages import Credit, Submit

from .fakes import WAIT_S, FakeGroup, RawClient, make_spec, piece

_CHILD = """
import sys, msgspec
from albireo.ipc.actor import Actor
from albireo.ipc.config import ActorSpec
from albireo.router.process import main
spec = msgspec.msgpack.decode(bytes.fromhex(sys.argv[1]), type=ActorSpec)
exec(sys.argv[3])
main(Actor(spec, {"control": int(sys.argv[2])}), {})
heavy = {"torch", "numba", "transformers"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


class RouterProcess:
    """program: run in the process before the router is."""

    def __init__(self, runtime_dir: Path, program: str = "") -> None:
        self.spec = make_spec(runtime_dir)
        self.path = f"{runtime_dir}/api.sock"
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(WAIT_S)
        spec = msgspec.msgpack.encode(self.spec).hex()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, spec, str(theirs.fileno()), program],
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        assert isinstance(from_actor.decode(self.control.recv(1 << 16)), Ready)


@pytest.fixture
def router(runtime_dir: Path) -> Iterator[RouterProcess]:
    router = RouterProcess(runtime_dir)
    yield router
    router.control.close()
    router.process.kill()
    router.process.wait()


def test_it_serves_when_it_says_so_and_stops_when_told(router: RouterProcess) -> None:
    group = FakeGroup(router.spec)
    group.join()
    client = RawClient(router)
    client.send(type="generate", id=1, prompt_ids=[5])
    submit = group.expect(Submit)
    group.output(piece(submit.request, 0, [1], "a", "stop"))
    assert client.receive_deltas(1)[0][3] == "a"
    router.control.send(msgspec.msgpack.encode(Stop()))
    assert client.expect_error("unavailable", None)["retry"]
    client.expect_close()
    assert router.process.wait(WAIT_S) == 0
    assert not os.path.exists(router.path)
    client.close()
    group.close()


def test_a_client_that_does_not_read_costs_little_memory(router: RouterProcess) -> None:
    group = FakeGroup(router.spec)
    group.join()
    client = RawClient(router)
    for number in range(32):
        client.send(type="generate", id=number, prompt_ids=[5], params={"max_tokens": 100})
    requests = [group.expect(Submit).request for _ in range(32)]
    process = psutil.Process(router.process.pid)
    before = process.memory_info().rss
    # 128,000 pieces of 8 characters: as separate deltas they would take 30 MB.
    for index in range(4000):
        group.output(*(piece(request, index, [7], "8 chars ") for request in requests))
        assert isinstance(group.next(), Credit)
    assert process.memory_info().rss - before < 8 * 2**20
    client.close()
    group.close()


def test_it_does_not_outlive_its_supervisor(router: RouterProcess) -> None:
    router.control.close()
    assert router.process.wait(WAIT_S) == EXIT_ORPHANED
