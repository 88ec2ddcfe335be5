"""A fork server where there is no room for another process."""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from albireo.ipc.config import ActorSpec, TenantConfig
from albireo.node.children import ForkServer, StartError, seqpacket_pair

from ..specs import ENGINE, MODEL

_PR_SET_CHILD_SUBREAPER = 36

# As the module itself, but that the system has no room for the first or the second of the two
# forks, while a file is there.
CROWDED = """
import errno, os, sys
from albireo.node import forkserver

which, full, server, fork = sys.argv[3], sys.argv[4], os.getpid(), os.fork

def fork_if_there_is_room():
    if which == ("first" if os.getpid() == server else "second") and os.path.exists(full):
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return fork()

os.fork = fork_if_there_is_room
forkserver.main()
"""


@pytest.fixture
def subreaper() -> Iterator[None]:
    """This process inherits orphans, as a supervisor does."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.mark.parametrize("which", ["first", "second"])
def test_each_order_has_one_answer_where_processes_are_short(
    subreaper: None, tmp_path: Path, which: str
) -> None:
    full = tmp_path / "full"

    async def ask() -> None:
        ours, theirs = seqpacket_pair()
        with theirs:
            process = subprocess.Popen(
                [
                    sys.executable, "-P", "-c", CROWDED,
                    str(theirs.fileno()), str(os.getpid()), which, str(full),
                ],
                pass_fds=(theirs.fileno(),),
            )  # fmt: skip
        process.returncode = 0  # its end is waited for as that of any child here
        server = ForkServer("the fork server", process.pid, ours)
        full.touch()
        for _ in range(2):
            with pytest.raises(StartError, match=r"could not be forked: .*temporarily unavailable"):
                await server.fork_understudy()
        full.unlink()
        understudy = await server.fork_understudy()
        assert server.alive and understudy.alive
        for each in (understudy, server):
            each.kill()
            await each.gone()

    asyncio.run(ask())


def test_what_is_too_long_to_be_told_is_refused_and_the_fork_server_lives() -> None:
    """It would get a part of it, and so would the next one that is tried."""
    weights = {f"a tenant named {number}": 2.0 for number in range(7000)}
    spec = ActorSpec(
        role="router", name="router", node="", incarnation=0, runtime_dir="", threads=1,
        log_level="info", model=MODEL, engine=ENGINE, tenants=TenantConfig(weights=weights),
    )  # fmt: skip

    async def ask() -> None:
        ours, theirs = seqpacket_pair()
        process = subprocess.Popen(["sleep", "60"])
        process.returncode = 0  # its end is waited for as that of any child here
        server = ForkServer("the fork server", process.pid, ours)
        with pytest.raises(StartError, match=r"has 2[0-9]{5} bytes, and 131072 are the limit"):
            await asyncio.wait_for(server.fork(spec, {}), 10)
        assert server.alive
        server.kill()
        await server.gone()
        theirs.close()
        ours.close()

    asyncio.run(ask())
