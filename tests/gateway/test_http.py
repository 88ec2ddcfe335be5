"""HTTP itself, on the wire: heads, bodies, limits, clients that leave or read slowly."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

import albireo.gateway.http as gateway_http
import albireo.gateway.server as gateway_server
from albireo.client import Delta, End
from albireo.gateway.link import Ask

from .played import PlayedLink, chunks
from .serving import Bare, Serving, wait_for

Serve = Callable[..., Serving]
_STREAM = b'{"prompt": "a", "stream": true, "max_tokens": 3}'


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    running: list[Serving] = []

    def start(
        link: PlayedLink | None = None, origins: tuple[str, ...] = (), interval: int = 1
    ) -> Serving:
        path = tmp_path / f"s{len(running)}"
        running.append(Serving(link or PlayedLink(), path, origins, interval))
        return running[-1]

    yield start
    for each in running:
        each.stop()


async def _for_ever(link: PlayedLink, number: int, ask: Ask, on_reply: Any) -> None:
    """A token every 5 ms until it is abandoned."""
    for place in range(10_000):
        on_reply(Delta(number, place, [1], "word "))
        await asyncio.sleep(0.005)


def test_tcp_and_unix_socket_answer_alike(serve: Serve) -> None:
    serving = serve()
    for transport in (None, httpx2.HTTPTransport(uds=serving.path)):
        base = f"http://127.0.0.1:{serving.port}"
        with httpx2.Client(base_url=base, transport=transport) as client:
            assert client.get("/health").status_code == 200
            assert client.get("/version").json() == {"version": "1.2.3"}
            answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
            assert answer.json()["choices"][0]["text"] == " a0"


def test_paths_and_methods(serve: Serve) -> None:
    with httpx2.Client(base_url=f"http://127.0.0.1:{serve().port}") as client:
        missing = client.get("/v1/engines")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
        wrong = client.get("/v1/completions")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        assert client.head("/health").status_code == 200
        assert client.get("/health").content == b""
        assert client.post("/ping").status_code == 200
        assert client.get("/v1/models").json()["data"][0]["id"] == "played"
        assert client.get("/v1/models/played").json()["max_model_len"] == 100
        assert client.get("/v1/models/other").status_code == 404
        assert (
            client.get("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")
        )
        assert client.get("/openapi.json").json()["openapi"].startswith("3.")
        assert "access-control-allow-origin" not in client.get(
            "/health", headers={"origin": "http://a"}
        ).headers  # fmt: skip


def test_health_is_503_when_no_group_is_ready_or_the_node_drains(serve: Serve) -> None:
    serving = serve()
    with httpx2.Client(base_url=f"http://127.0.0.1:{serving.port}") as client:
        serving.link.tree["groups"][0]["state"] = "restarting"
        answer = client.get("/health")
        assert (answer.status_code, answer.content) == (503, b"")
        serving.link.tree["groups"][0]["state"] = "ready"
        serving.link.tree["draining"] = True
        assert client.get("/health").status_code == 503


def test_request_ids(serve: Serve) -> None:
    with httpx2.Client(base_url=f"http://127.0.0.1:{serve().port}") as client:
        body = {"prompt": "a", "max_tokens": 1}
        answer = client.post("/v1/completions", json=body, headers={"x-request-id": "my-id.1"})
        assert answer.headers["x-request-id"] == "my-id.1"
        assert answer.json()["id"] == "cmpl-my-id.1"
        body["request_id"] = "another"
        answer = client.post("/v1/completions", json=body, headers={"x-request-id": "my-id.1"})
        assert answer.headers["x-request-id"] == "another"
        for given in ("", "x" * 200, "a b", "a\tb"):
            answer = client.post("/nowhere", headers={"x-request-id": given})
            assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
        body["request_id"] = "bad id"
        assert client.post("/v1/completions", json=body).json()["error"]["param"] == "request_id"


def test_cors_only_for_the_origins_that_are_allowed(serve: Serve) -> None:
    with httpx2.Client(base_url=f"http://127.0.0.1:{serve(origins=('http://a',)).port}") as client:
        asks = {"access-control-request-method": "POST"}
        good = client.options("/v1/chat/completions", headers={"origin": "http://a", **asks})
        assert good.headers["access-control-allow-origin"] == "http://a"
        bad = client.options("/v1/chat/completions", headers={"origin": "http://b", **asks})
        assert "access-control-allow-origin" not in bad.headers
        answer = client.get("/version", headers={"origin": "http://a"})
        assert answer.headers["access-control-allow-origin"] == "http://a"


def test_a_connection_serves_many_requests(serve: Serve) -> None:
    bare = Bare(serve())
    for _ in range(3):
        bare.post("/v1/completions", _STREAM)
        assert b"200 OK" in bare.until(b"\r\n")
        bare.until(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        bare.post("/v1/completions", b"{")
        assert b"400" in bare.until(b"\r\n")
        bare.until(b'"code":null}}')
    bare.close()


def test_a_body_above_the_limit_is_413(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_http, "MAX_BODY_BYTES", 1000)
    serving = serve()
    announced = Bare(serving)
    announced.post("/v1/completions", b"x" * 1001)
    assert b"413" in announced.until(b"\r\n")
    bare = Bare(serving)
    bare.socket.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"320\r\n" + b"x" * 800 + b"\r\n" + b"320\r\n" + b"x" * 800 + b"\r\n"
    )  # fmt: skip
    assert b"413" in bare.until(b"\r\n")
    assert serving.link.asks == []


def test_a_body_that_does_not_come_is_408(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_http, "BODY_TIMEOUT_S", 0.05)
    bare = Bare(serve())
    bare.socket.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
    assert b"408" in bare.to_the_end()


def test_a_head_that_does_not_come_ends_the_connection(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_server, "HEAD_TIMEOUT_S", 0.1)
    serving = serve()
    for beginning in (b"", b"GET /health HTTP/1.1\r\nHost"):
        bare = Bare(serving)
        bare.socket.sendall(beginning)
        assert bare.to_the_end() == b""
    wait_for(lambda: serving.connections == 0)


def test_a_head_has_a_limit(serve: Serve) -> None:
    serving = serve()
    for beginning in (b"GET /", b"GET / HTTP/1.1\r\nHost: ", b"GET / HTTP/1.1\r\n"):
        bare = Bare(serving)
        bare.socket.sendall(beginning)
        piece = b"a: b\r\n" * 1000 if beginning.endswith(b"\r\n") else b"a" * 6000
        with pytest.raises(ConnectionError):
            for _ in range(5000):
                bare.socket.sendall(piece)
        wait_for(lambda: serving.connections == 0)
    assert httpx2.get(f"http://127.0.0.1:{serving.port}/health").status_code == 200


def test_bytes_that_are_no_http_are_refused(serve: Serve) -> None:
    serving = serve()
    for data in (b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"\x00" * 100):
        bare = Bare(serving)
        bare.socket.sendall(data)
        assert bare.to_the_end().startswith(b"HTTP/1.1 400")
    assert httpx2.get(f"http://127.0.0.1:{serving.port}/health").status_code == 200


def _offer(body: bytes, connection: str = "Upgrade, HTTP2-Settings") -> bytes:
    """A POST whose client would rather speak HTTP/2, as Java's does with every one."""
    return (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: {connection}\r\n"
        f"Upgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


_OFFER = _offer(b'{"prompt": "\\r\\n\\r\\nUpgrade: h2c", "max_tokens": 1}')


@pytest.mark.parametrize(
    "ends",
    [(), (20,), (_OFFER.index(b"grade: h2c"),), (_OFFER.index(b"{"),), (_OFFER.index(b"{") + 9,)],
    ids=["whole", "in the head", "in the field's name", "behind the head", "in the body"],
)
def test_an_upgrade_that_is_offered_is_ignored(serve: Serve, ends: tuple[int, ...]) -> None:
    serving = serve()
    bare = Bare(serving)
    bare.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(2):
        for begin, end in itertools.pairwise((0, *ends, len(_OFFER))):
            bare.socket.sendall(_OFFER[begin:end])
            time.sleep(0.02)  # a packet of its own
        assert b"200 OK" in bare.until(b"\r\n")
        bare.until(b'"prompt_logprobs":null}')
        bare.until(b"}}")
    assert [each.prompt for each in serving.link.asks] == ["\r\n\r\nUpgrade: h2c"] * 2


def test_requests_behind_one_with_an_upgrade_are_not_lost(serve: Serve) -> None:
    serving = serve()
    bare = Bare(serving)
    bodies = [b'{"prompt": "%d", "max_tokens": 1}' % number for number in range(4)]
    last = _offer(bodies[3], "close, Upgrade")
    bare.socket.sendall(_offer(bodies[0]) + _offer(bodies[1]))
    bare.post("/v1/completions", bodies[2])
    bare.socket.sendall(last)
    assert bare.to_the_end().count(b"HTTP/1.1 200 OK") == 4
    assert [each.prompt for each in serving.link.asks] == ["0", "1", "2", "3"]


def test_many_upgrades_in_one_packet(serve: Serve) -> None:
    bare = Bare(serve())
    ask = b"GET /ping HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: a\r\n\r\n"
    bare.socket.sendall(ask * 2000 + b"GET\r\n\r\n")
    assert bare.to_the_end().endswith(b"Invalid HTTP request received.")


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_that_offers_http2(serve: Serve) -> None:
    url = f"http://127.0.0.1:{serve().port}/v1/completions"
    body = '{"prompt": "a", "max_tokens": 1}'
    asked = ["curl", "-sS", "--noproxy", "*", "--max-time", "5", "--http2", "-d", body, url]
    answer = subprocess.run(asked, capture_output=True, check=True)
    assert json.loads(answer.stdout)["choices"][0]["text"] == " a0"


@pytest.mark.parametrize("prompt", ['"a"', '["a", "b"]'])
@pytest.mark.parametrize("keep", [b"", b"Connection: keep-alive\r\n"])
def test_a_stream_in_http_1_0_has_no_chunks_and_ends_with_the_connection(
    serve: Serve, prompt: str, keep: bytes
) -> None:
    bare = Bare(serve())
    body = b'{"prompt": %b, "stream": true, "max_tokens": 3}' % prompt.encode()
    length = b"Content-Length: %d\r\n" % len(body)
    bare.socket.sendall(b"POST /v1/completions HTTP/1.0\r\n" + keep + length + b"\r\n" + body)
    head, _, events = bare.to_the_end().partition(b"\r\n\r\n")
    fields = head.lower().split(b"\r\n")
    assert b"connection: close" in fields
    assert not any(each.startswith((b"transfer-encoding", b"content-length")) for each in fields)
    *answer, done, rest = events.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    texts = [json.loads(each.removeprefix(b"data: "))["choices"][0]["text"] for each in answer]
    assert [each for each in texts if "a" in each] == [" a0", " a1", " a2"]


def test_a_whole_answer_in_http_1_0_has_its_length(serve: Serve) -> None:
    bare = Bare(serve())
    bare.socket.sendall(b"GET /version HTTP/1.0\r\n\r\n")
    head, _, body = bare.to_the_end().partition(b"\r\n\r\n")
    assert b"content-length: %d" % len(body) in head.split(b"\r\n")
    assert json.loads(body) == {"version": "1.2.3"}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(serve: Serve, stream: bool) -> None:
    serving = serve(PlayedLink(_for_ever))
    bare = Bare(serving)
    body = {"prompt": ["a", "b"], "stream": stream, "max_tokens": 50}
    bare.post("/v1/completions", json.dumps(body).encode())
    if stream:
        bare.until(b"word ")
    else:
        wait_for(lambda: len(serving.link.asks) == 2)
    assert serving.link.abandoned == []
    bare.close()
    wait_for(lambda: serving.link.abandoned == [0, 1], 0.5)


def test_a_slow_reader_gets_few_long_events_and_loses_nothing(serve: Serve) -> None:
    tokens = 4000
    word = "a word of two thousand characters " * 60

    async def flood(link: PlayedLink, number: int, ask: Ask, on_reply: Any) -> None:
        for place in range(tokens):
            end = End("length", None, 1, tokens) if place == tokens - 1 else None
            on_reply(Delta(number, place, [1], f"{place} {word}", end))
            if place % 4 == 0:
                await asyncio.sleep(0)

    serving = serve(PlayedLink(flood))
    bare = Bare(serving, receive_bytes=65536)
    bare.post("/v1/completions", _STREAM)
    wait_for(lambda: all(task.done() for task in serving.link._tasks) and bool(serving.link.asks))
    text = bare.until(b"data: [DONE]").decode()
    events = re.findall(r'"text":"([^"]*)"', text)
    assert "".join(events) == "".join(f"{place} {word}" for place in range(tokens))
    assert len(events) < tokens / 2


def test_stopping_gives_streams_a_moment_and_then_ends(serve: Serve) -> None:
    serving = serve(PlayedLink(_for_ever))
    bare = Bare(serving)
    bare.post("/v1/completions", _STREAM)
    bare.until(b"word ")
    assert serving.stop() < 2.0
    with pytest.raises((EOFError, ConnectionError)):
        bare.until(b"never")


def test_a_reader_that_has_stopped_is_gone_in_the_end(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_server, "STALL_TIMEOUT_S", 0.2)

    async def endless(link: PlayedLink, number: int, ask: Ask, on_reply: Any) -> None:
        while True:
            on_reply(Delta(number, 0, [1], "x" * 100_000))
            await asyncio.sleep(0.001)

    serving = serve(PlayedLink(endless))
    bare = Bare(serving, receive_bytes=4096)
    bare.post("/v1/completions", _STREAM)
    wait_for(lambda: serving.link.abandoned == [0])


def test_a_reader_that_is_slow_is_not_taken_for_one_that_has_stopped(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_server, "STALL_TIMEOUT_S", 0.4)

    async def long(link: PlayedLink, number: int, ask: Ask, on_reply: Any) -> None:
        on_reply(Delta(number, 0, [1], "x" * 8_000_000))
        await asyncio.sleep(60)

    serving = serve(PlayedLink(long))
    bare = Bare(serving, receive_bytes=4096)
    bare.post("/v1/completions", _STREAM)
    for _ in range(40):
        assert bare.socket.recv(2048)
        time.sleep(0.03)
    assert serving.connections == 1 and not serving.link.abandoned
    # And then it does stop.
    wait_for(lambda: serving.link.abandoned == [0])


def test_a_reader_in_fits_and_starts_gets_everything_in_order(serve: Serve) -> None:
    """The ways past and through the inbox alternate; neither overtakes the other."""
    tokens = 3000
    word = "x" * 1000

    async def flood(link: PlayedLink, number: int, ask: Ask, on_reply: Any) -> None:
        for place in range(tokens):
            end = End("length", None, 1, tokens) if place == tokens - 1 else None
            on_reply(Delta(number, place, [1], f"{place} {word} ", end))
            if place % 3 == 0:
                await asyncio.sleep(0.0002)

    serving = serve(PlayedLink(flood))
    bare = Bare(serving, receive_bytes=16384)
    bare.post("/v1/completions", _STREAM)
    pieces = []
    while not pieces or b"[DONE]" not in pieces[-1][-40:]:
        pieces.append(bare.socket.recv(1 << 18))
        time.sleep(0.002 if len(pieces) % 10 else 0.05)
    text = "".join(re.findall(r'"text":"([^"]*)"', _unchunked(b"".join(pieces)).decode()))
    assert text.split() == [each for place in range(tokens) for each in (str(place), word)]


@pytest.mark.parametrize(
    "extra", [{}, {"logprobs": 1}, {"echo": True, "logprobs": 1}, {"n": 2, "logprobs": 0}]
)
def test_events_that_pass_the_inbox_by_add_up(serve: Serve, extra: dict[str, Any]) -> None:
    body = {"prompt": "a", "max_tokens": 30, **extra}
    with httpx2.Client(base_url=f"http://127.0.0.1:{serve().port}") as client:
        whole = client.post("/v1/completions", json=body).json()["choices"]
        got = chunks(client.post("/v1/completions", json={**body, "stream": True}))
    for choice in whole:
        own = [c for g in got for c in g["choices"] if c["index"] == choice["index"]]
        assert "".join(each["text"] for each in own) == choice["text"]
        if "logprobs" in extra:
            for field in ("tokens", "text_offset"):
                joined = [v for each in own if each["logprobs"] for v in each["logprobs"][field]]
                assert joined == choice["logprobs"][field]


@pytest.mark.parametrize("body", [{"prompt": "a", "n": 2}, {"prompt": ["a", "b"]}])
def test_the_last_of_several_answers_keeps_its_index(serve: Serve, body: dict[str, Any]) -> None:
    async def one_is_short(link: PlayedLink, number: int, ask: Ask, on_reply: Any) -> None:
        short = End("stop", None, 1, 1)
        if number == 0:
            on_reply(Delta(number, 0, [1], "short", short))
        if number or ask.params.n > 1:
            choice = ask.params.n - 1
            for place in range(5):
                end = End("length", None, 1, 5) if place == 4 else None
                on_reply(Delta(number, place, [1], f" {place}", end, choice))
                await asyncio.sleep(0.005)

    url = f"http://127.0.0.1:{serve(PlayedLink(one_is_short)).port}/v1/completions"
    said = {0: "", 1: ""}
    for each in chunks(httpx2.post(url, json={**body, "stream": True})):
        said[each["choices"][0]["index"]] += each["choices"][0]["text"]
    assert said == {0: "short", 1: " 0 1 2 3 4"}


def _unchunked(data: bytes) -> bytes:
    """The body of an answer with chunked encoding."""
    _, _, rest = data.partition(b"\r\n\r\n")
    body = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body.append(rest[:length])
        rest = rest[length + 2 :]
        if length == 0:
            break
    return b"".join(body)


def test_the_interval_holds_from_the_second_token_on(serve: Serve) -> None:
    serving = serve(interval=4)
    body = {"prompt": "a", "stream": True, "max_tokens": 10}
    answer = httpx2.post(f"http://127.0.0.1:{serving.port}/v1/completions", json=body)
    texts = [each["choices"][0]["text"] for each in chunks(answer)]
    assert [len(each.split()) for each in texts] == [1, 4, 4, 1]
    assert "".join(texts) == "".join(f" a{place}" for place in range(10))
