"""Clients over TCP: TLS and keys, and everything that is neither."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import resource
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from albireo.client import (
    AsyncClient,
    AuthenticationError,
    Client,
    InvalidRequest,
    NodeNotRunning,
    Unavailable,
)
from albireo.ipc import tls_door
from albireo.ipc.config import ListenConfig
from albireo.ipc.messages import Abort, Credit, Submit
from albireo.router import connections, session

from ..certificates import Pair, self_signed
from .conftest import Neighbourhood
from .fakes import WAIT_S, Automatic, piece

Start = Callable[..., Neighbourhood]
KEY = "key-of-alice"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return self_signed(tmp_path_factory.mktemp("tls"), "node")


@pytest.fixture
def listen(pair: Pair, tmp_path: Path) -> ListenConfig:
    keys = tmp_path / "keys"
    keys.write_text(f"alice:{KEY}\nbob:key-of-bob\n")
    return ListenConfig(tls_cert=pair.cert, tls_key=pair.key, api_key_file=str(keys))


@pytest.fixture
def near(start: Start, listen: ListenConfig) -> Neighbourhood:
    return start(listen=listen)


def url(near: Neighbourhood, host: str = "127.0.0.1") -> str:
    return f"tls://{host}:{near.router.port}"


def raw(near: Neighbourhood) -> socket.socket:
    return socket.create_connection(("127.0.0.1", near.router.port), WAIT_S)


def shaken(near: Neighbourhood, pair: Pair) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=pair.cert)
    return context.wrap_socket(raw(near), server_hostname="127.0.0.1")


def say(connection: socket.socket, message: dict[str, object]) -> None:
    payload = msgspec.msgpack.encode(message)
    connection.sendall(struct.pack("<I", len(payload)) + payload)


def closed_by_the_router(connection: socket.socket) -> bool:
    connection.settimeout(WAIT_S)
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while connection.recv(1 << 16):
            pass
    return True


def still_serves(near: Neighbourhood, pair: Pair) -> bool:
    with Client.connect(url(near), api_key=KEY, ca=pair.cert) as client:
        return client.welcome.model == "fake-model" and near.router.alive


@pytest.fixture
def automatic(near: Neighbourhood) -> Iterator[None]:
    playing = Automatic(near.router.spec)
    yield
    playing.stop()


# ---------------------------------------------------------------------- what works
def test_both_clients_get_their_tokens(near: Neighbourhood, pair: Pair, automatic: None) -> None:
    with Client.connect(url(near), api_key=KEY, ca=pair.cert) as client:
        assert client.generate("abc", max_tokens=120).text == "abc" * 40
        streams = [client.stream("xyz", max_tokens=90) for _ in range(20)]
        assert all("".join(delta.text for delta in each) == "xyz" * 30 for each in streams)

    async def ask() -> str:
        where = url(near, "localhost")
        async with await AsyncClient.connect(where, api_key="key-of-bob", ca=pair.cert) as client:
            return (await client.generate("abc", max_tokens=6)).text

    assert asyncio.run(ask()) == "abcabc"


def test_many_threads_share_a_connection(near: Neighbourhood, pair: Pair, automatic: None) -> None:
    prompt = list(range(101, 127)) * 4
    with (
        Client.connect(url(near), api_key=KEY, ca=pair.cert) as client,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        found = pool.map(lambda n: client.generate(prompt, max_tokens=20).token_ids, range(100))
        assert all(each == prompt[:20] for each in found)


def test_the_key_is_the_tenant_whatever_the_request_says(near: Neighbourhood, pair: Pair) -> None:
    group = near.group()
    connection = shaken(near, pair)
    for message in (
        {"type": "hello", "protocol": 1, "api_key": KEY},
        {"type": "generate", "id": 1, "prompt_ids": [5], "tenant": "bob"},
    ):
        say(connection, message)
    assert group.expect(Submit).tenant == "alice"
    connection.close()
    assert isinstance(group.next(), Abort)


def test_a_request_goes_on_for_the_key_that_asked(
    start: Start, listen: ListenConfig, pair: Pair
) -> None:
    """Another one's that knows the session's name gets nothing."""
    near = start(listen=listen, resume_s=5.0)
    group = near.group()

    def join(key: str) -> ssl.SSLSocket:
        connection = shaken(near, pair)
        say(connection, {"type": "hello", "protocol": 1, "api_key": key, "session": "s" * 22})
        return connection

    alice = join(KEY)
    say(alice, {"type": "generate", "id": 1, "prompt_ids": [5], "params": {"max_tokens": 9}})
    group.output(piece(group.expect(Submit).request, 0, [11], "a"))
    group.expect(Credit)  # The piece is with her: closed before, she could be gone first.
    alice.close()
    group.expect(Abort)
    bob = join("key-of-bob")
    say(bob, {"type": "resume", "id": 1, "have": [[0, 1]]})
    bob.settimeout(WAIT_S)
    heard = b""
    while b"lost" not in heard:
        heard += (more := bob.recv(1 << 16))
        assert more
    bob.close()
    alice = join(KEY)  # Kept: a connection that ends takes what it said along.
    say(alice, {"type": "resume", "id": 1, "have": [[0, 1]]})
    again = group.expect(Submit)
    assert (again.tenant, again.prompt_ids) == ("alice", [5, 11])
    alice.close()


# ---------------------------------------------------------------------- who is sent away
@pytest.mark.parametrize("key", ["", "wrong-key", KEY + "x"])
def test_a_wrong_key_is_said(near: Neighbourhood, pair: Pair, key: str) -> None:
    with pytest.raises(AuthenticationError, match="API key") as caught:
        Client.connect(url(near), api_key=key, ca=pair.cert)
    assert ("--api-key-file FILE" in str(caught.value)) == (not key)
    assert not caught.value.retry and KEY not in str(caught.value)

    async def ask() -> None:
        await AsyncClient.connect(url(near), api_key=key, ca=pair.cert)

    with pytest.raises(AuthenticationError):
        asyncio.run(ask())
    assert still_serves(near, pair)


def test_the_unix_socket_asks_for_no_key(near: Neighbourhood) -> None:
    with Client.connect(near.router.path) as client:
        assert client.welcome.node == "test"


def test_a_certificate_that_is_not_trusted(near: Neighbourhood, pair: Pair, tmp_path: Path) -> None:
    other = self_signed(tmp_path, "other")
    for authority in (None, other.cert):
        with pytest.raises(NodeNotRunning, match=r"not trusted.* as ca \(--ca FILE of commands\)"):
            Client.connect(url(near), api_key=KEY, ca=authority)

        async def ask(authority: str | None = authority) -> None:
            await AsyncClient.connect(url(near), api_key=KEY, ca=authority)

        with pytest.raises(NodeNotRunning, match="not trusted"):
            asyncio.run(ask())
    assert still_serves(near, pair)


def test_a_name_that_is_not_in_the_certificate(
    start: Start, listen: ListenConfig, tmp_path: Path
) -> None:
    far = self_signed(tmp_path, "far", "DNS:far.example")
    near = start(listen=msgspec.structs.replace(listen, tls_cert=far.cert, tls_key=far.key))
    with pytest.raises(NodeNotRunning, match="a name that is in it"):
        Client.connect(url(near), api_key=KEY, ca=far.cert)


@pytest.mark.parametrize(
    "text", ["tls://host", "tls://:1", "tls://h:x", "http://h:1", "tls://h:1/path", "tcp://h:1"]
)
def test_an_address_that_is_none(text: str) -> None:
    with pytest.raises(InvalidRequest, match="tls://HOST:PORT"):
        Client.connect(text)


def test_an_authority_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "ca").write_text("nothing")
    for ca in (str(tmp_path / "ca"), str(tmp_path / "none")):
        with pytest.raises(InvalidRequest, match="PEM"):
            Client.connect("tls://127.0.0.1:1", ca=ca)
    with pytest.raises(InvalidRequest, match="over TCP"):
        Client.connect("/some/socket", ca=str(tmp_path / "ca"))


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(NodeNotRunning, match="no node answers"):
        Client.connect(f"tls://127.0.0.1:{port}", api_key=KEY)


# ---------------------------------------------------------------------- hostile bytes
@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<I", 4) + b"\x81\xa1a\x01",
        b"\x16\x03\x01\xff\xff" + bytes(70_000),
        b"\x16\x03\x00\x00\x05\x01\x00\x00\x01\x00",
        b"\x00" * 100,
    ],
)
def test_bytes_that_are_no_tls_end_the_connection(
    near: Neighbourhood, pair: Pair, data: bytes
) -> None:
    connection = raw(near)
    with contextlib.suppress(ConnectionError):
        connection.sendall(data)
    assert closed_by_the_router(connection)
    connection.close()
    assert still_serves(near, pair)


def test_a_slow_handshake_has_its_time(
    near: Neighbourhood, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_door, "HANDSHAKE_TIMEOUT_S", 0.2)
    silent, half = raw(near), raw(near)
    half.sendall(b"\x16\x03\x01\x02\x00\x01\x00")  # the beginning of a ClientHello
    assert closed_by_the_router(silent) and closed_by_the_router(half)
    silent.close()
    half.close()
    monkeypatch.undo()
    assert still_serves(near, pair)


def test_handshakes_of_one_address_are_bounded(
    near: Neighbourhood, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_door, "MAX_HANDSHAKES_OF_ONE_ADDRESS", 3)
    held = [raw(near) for _ in range(3)]
    assert closed_by_the_router(raw(near))
    for each in held:
        each.close()
    monkeypatch.undo()
    assert still_serves(near, pair)


def test_who_never_says_hello_is_sent_away(
    near: Neighbourhood, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "HELLO_TIMEOUT_S", 0.1)
    assert closed_by_the_router(shaken(near, pair))


def test_a_connection_that_breaks_ends_its_requests(near: Neighbourhood, pair: Pair) -> None:
    group = near.group()
    client = Client.connect(url(near), api_key=KEY, ca=pair.cert)
    client.stream([5], max_tokens=9)
    number = group.expect(Submit).request
    # No close_notify, no FIN: a reset.
    raw_socket = client._link._connection._raw  # type: ignore[union-attr]
    raw_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw_socket.shutdown(socket.SHUT_RD)
    raw_socket.close()
    assert group.expect(Abort).request == number
    assert still_serves(near, pair)


def test_who_takes_nothing_is_cut_off(
    near: Neighbourhood, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "STALL_TIMEOUT_S", 0.3)
    group = near.group()
    connection = shaken(near, pair)
    for message in (
        {"type": "hello", "protocol": 1, "api_key": KEY},
        {"type": "generate", "id": 1, "prompt_ids": [5], "params": {"max_tokens": 120}},
    ):
        payload = msgspec.msgpack.encode(message)
        connection.sendall(struct.pack("<I", len(payload)) + payload)
    number = group.expect(Submit).request
    for index in range(100):
        group.output(piece(number, index, [7], "x" * 100_000))
    while not isinstance(group.next(), Abort):
        pass
    connection.close()
    assert still_serves(near, pair)


def test_who_takes_it_slowly_is_not(
    near: Neighbourhood, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "STALL_TIMEOUT_S", 0.5)
    group = near.group()
    connection = shaken(near, pair)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    say(connection, {"type": "hello", "protocol": 1, "api_key": KEY})
    say(connection, {"type": "generate", "id": 1, "prompt_ids": [5], "params": {"max_tokens": 120}})
    number = group.expect(Submit).request
    for index in range(100):
        group.output(piece(number, index, [7], "x" * 100_000))
        assert isinstance(group.next(), Credit)
    for _ in range(40):
        assert connection.recv(1 << 14)
        time.sleep(0.03)
    assert group.silent(0.0)
    connection.close()


# ---------------------------------------------------------------------- numbers
def test_one_key_cannot_take_all_places(
    near: Neighbourhood, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections.Connections, "most", 16)
    held = [Client.connect(url(near), api_key=KEY, ca=pair.cert) for _ in range(2)]
    with pytest.raises(Unavailable, match="2 clients are connected with this API key"):
        Client.connect(url(near), api_key=KEY, ca=pair.cert)
    held.append(Client.connect(url(near), api_key="key-of-bob", ca=pair.cert))
    monkeypatch.setattr(connections.Connections, "most", 6)
    with pytest.raises(Unavailable, match="3 clients are connected over TCP"):
        Client.connect(url(near), api_key="key-of-bob", ca=pair.cert)
    Client.connect(near.router.path).close()
    for each in held:
        each.close()
    monkeypatch.undo()
    assert still_serves(near, pair)


def test_a_client_that_comes_back_is_counted_once(
    near: Neighbourhood, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its old connection was still open, and ends as it says hello on the new one."""
    monkeypatch.setattr(connections.Connections, "most", 16)

    def join() -> ssl.SSLSocket:
        connection = shaken(near, pair)
        say(connection, {"type": "hello", "protocol": 1, "api_key": KEY, "session": "s" * 22})
        return connection

    latest = join()
    for _ in range(3):
        before, latest = latest, join()
        assert closed_by_the_router(before)
        before.close()
    with (
        Client.connect(url(near), api_key=KEY, ca=pair.cert),
        pytest.raises(Unavailable, match="2 clients are connected with this API key"),
    ):
        Client.connect(url(near), api_key=KEY, ca=pair.cert)
    latest.close()


def test_without_open_files_nobody_is_accepted_and_nothing_spins(
    near: Neighbourhood, pair: Pair
) -> None:
    still_serves(near, pair)
    over_tcp, over_unix = socket.socket(), socket.socket(socket.AF_UNIX)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        over_tcp.connect(("127.0.0.1", near.router.port))
        over_unix.connect(near.router.path)
        began = time.process_time()
        time.sleep(0.5)
        spent = time.process_time() - began
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    over_tcp.close()
    over_unix.close()
    assert spent < 0.25
    assert still_serves(near, pair)
    Client.connect(near.router.path).close()
