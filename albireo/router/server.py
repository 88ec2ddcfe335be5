"""The router's doors: the clients' sockets and the actors' Hub.

api.sock     Unix stream, 0600: a Session for each connection
TCP          with TLS and API keys, where it is asked for: the same (tls_door.py)
router.zmq   ZeroMQ: supervisor, tokenizer, detokenizers
out.sock     Unix stream, 0600: tokens from the detokenizers (output_door.py)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from albireo.ipc.config import ActorSpec
from albireo.ipc.framing import FrameEncoder
from albireo.ipc.keys import KeyFileError, load_keys
from albireo.ipc.paths import API_SOCKET, OUTPUT_SOCKET, require_socket_path
from albireo.ipc.timeline import Recorder
from albireo.ipc.tls import TlsError, server_context
from albireo.ipc.tls_door import TlsDoor

from .actors import ActorMessages
from .hub import AsyncHub
from .journal import Journal
from .output_door import OutputDoor
from .records import opened_by
from .requests import Refusal
from .router import Router
from .session import Session

_BACKLOG = 1024
_FAREWELL_S = 0.3
_log = logging.getLogger(__name__)


async def serve(
    spec: ActorSpec,
    ready: Callable[[], None],
    stop_fd: int,
    timeline: Recorder | None = None,
    tcp: socket.socket | None = None,
) -> None:
    """Serves until `stop_fd` becomes readable; then everybody gets a last word.

    `ready` is called when clients can connect.  tcp: bound, for the clients of spec.listen.
    """
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    loop.add_reader(stop_fd, stopped.set)
    hub = AsyncHub(spec.socket_path("router"))
    journal = _journal(spec)
    router = Router(spec, hub.send, timeline or Recorder.of({}), journal)
    actors = ActorMessages(spec, router, hub.send)
    outputs = OutputDoor(actors.output, actors.output_lost)
    output_path = f"{spec.runtime_dir}/{OUTPUT_SOCKET}"
    output_listener = await loop.create_unix_server(outputs.lane, sock=_bind(output_path))
    hub.listen(actors.receive)
    encoder = FrameEncoder()
    path = f"{spec.runtime_dir}/{API_SOCKET}"
    listener = await loop.create_unix_server(
        lambda: Session(router, encoder), sock=_bind(path), backlog=_BACKLOG
    )
    door = None if tcp is None else _open_tcp(spec, tcp, router, encoder)
    try:
        ready()
        await stopped.wait()
    finally:
        loop.remove_reader(stop_fd)
        listener.close()
        if door is not None:
            door.close()
            await door.wait_closed()
        output_listener.close()
        for each in (path, output_path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(each)
        await _say_farewell(router)
        outputs.close()
        actors.close()
        hub.close()
        if journal is not None:
            journal.close()


def _journal(spec: ActorSpec) -> Journal | None:
    """What the router before this one has left is in it.  Raises JournalError."""
    if not spec.journal:
        return None
    began = time.monotonic()
    path = Path(spec.journal)
    journal = Journal(
        path,
        spec.journal_bytes,
        spec.journal_sync_s,
        opened_by(spec),
        restarted=spec.incarnation > 0,
    )
    _log.info(
        "the journal has %d requests, which wait %g s for their clients; read in %.3f s",
        len(journal.found), spec.resume_s, time.monotonic() - began,
    )  # fmt: skip
    return journal


def _open_tcp(
    spec: ActorSpec, tcp: socket.socket, router: Router, encoder: FrameEncoder
) -> TlsDoor | None:
    """The supervisor has read these files before; those on this machine are served without."""
    config = spec.listen
    assert config is not None
    try:
        keys = load_keys(config.api_key, config.api_key_file)
        context = server_context(config.tls_cert, config.tls_key)
    except (KeyFileError, TlsError) as error:
        _log.error("clients over TCP are not served: %s", error)
        return None
    return TlsDoor(tcp, context, lambda: Session(router, encoder, keys))


def _bind(path: str) -> socket.socket:
    """A bound socket that only its owner can connect to; a dead router's file is replaced.

    Nobody can be faster than chmod: until the loop listens, connecting fails.
    """
    require_socket_path(path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        os.chmod(path, 0o600)
    except OSError:
        listener.close()
        raise
    return listener


async def _say_farewell(router: Router) -> None:
    """Ends what is in flight with an error, and gives the errors a moment to leave."""
    router.refusing = Refusal("unavailable", "the node is shutting down", retry=True)
    router.fail_all(router.refusing)
    for session in list(router.sessions):
        session.dismiss(router.refusing)
    deadline = time.monotonic() + _FAREWELL_S
    while router.sessions and time.monotonic() < deadline:
        await asyncio.sleep(0.005)
