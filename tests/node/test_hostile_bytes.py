"""Random, malformed and old-protocol bytes at every socket of a node: nothing dies of them."""

from __future__ import annotations

import contextlib
import random
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import pytest
import zmq

from albireo.ipc.paths import node_dir
from albireo.node.runtime_dir import read_facts

from ..certificates import self_signed
from .processes import pids, wait_for, whole

pytestmark = pytest.mark.node
_ZMTP_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\x00" + bytes(31)


def hostile(rng: random.Random) -> Iterator[bytes]:
    """Streams of bytes: noise, heads of every protocol that is spoken here, and their old ones."""
    hello = msgspec.msgpack.encode({"type": "hello", "protocol": 0, "version": "0.0.1"})
    order = b'{"action": "restart", "group": 0'
    heads = (
        b"",
        struct.pack("<I", len(hello)) + hello,
        struct.pack("<I", 0xFFFFFFFF),
        struct.pack(">I", len(hello)) + hello,
        _ZMTP_GREETING,
        _ZMTP_GREETING + b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER",
        b"\x01\x00" * 40,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n",
        b"GET / HTTP/0.9\r\n\r\n",
        order + b', "timeout_s": 1e400}\n',
        b"[" * 50_000 + b"\n",
        order + b"x" * 70_000,
    )
    for head in heads:
        yield head
        yield head + rng.randbytes(rng.randrange(1, 3000))
    for _ in range(10):
        yield rng.randbytes(rng.randrange(1, 200))


def strike(family: int, where: object, data: bytes) -> None:
    with socket.socket(family) as connection, contextlib.suppress(OSError):
        connection.settimeout(0.02)
        connection.connect(where)  # type: ignore[arg-type]
        connection.sendall(data)
        while connection.recv(1 << 16):
            pass


def test_every_socket_takes_everything(
    start_node: Callable[..., str], tiny_model_dir: Path, tmp_path: Path
) -> None:
    pair = self_signed(tmp_path, "node")
    node = start_node(
        name="hostile", model=str(tiny_model_dir), device="sim", sim_step_ms=1.0,
        api_key="key-of-alice", http="127.0.0.1:0", uds=str(tmp_path / "uds"),
        listen="127.0.0.1:0", tls_cert=pair.cert, tls_key=pair.key,
    )  # fmt: skip
    before = pids(node)
    facts = read_facts(node)
    assert facts is not None
    paths = [path for path in node_dir(node).iterdir() if stat.S_ISSOCK(path.stat().st_mode)]
    names = {path.name for path in paths}
    assert names == {"api.sock", "node.sock", "out.sock", "router.zmq", "g0.zmq"}
    assert {stat.S_IMODE(node_dir(node).stat().st_mode)} == {0o700}
    assert {stat.S_IMODE(p.stat().st_mode) & 0o077 for p in [*paths, tmp_path / "uds"]} == {0}
    ports = [urlsplit(facts[name]).port for name in ("http", "listen")]
    rng = random.Random(7)
    for data in hostile(rng):
        for path in (*paths, tmp_path / "uds"):
            strike(socket.AF_UNIX, str(path), data)
        for port in ports:
            strike(socket.AF_INET, ("127.0.0.1", port), data)
    # Peers that speak ZeroMQ well, and nothing else.
    context = zmq.Context.instance()
    for name in ("router.zmq", "g0.zmq"):
        stranger = context.socket(zmq.DEALER)
        stranger.connect(f"ipc://{node_dir(node) / name}")
        for data in hostile(rng):
            stranger.send_multipart([data, data[:9]] if rng.random() < 0.2 else [data])
        stranger.close(linger=500)
    wait_for("the node serves", lambda: whole(node), 20)
    assert pids(node) == before
