"""The client of `bench serve` against servers that cut, delay, break and lie."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from albireo.bench.nodes import BenchError
from albireo.bench.serving.connection import Answer, Connections, Target

from .played_server import (
    DONE,
    HEAD,
    PlayedServer,
    Script,
    chunked,
    event,
    playing,
    sized,
    text,
    usage,
)

THREE = text("a") + text("b") + text("c", "length") + usage(7, 9) + DONE


def ask(
    path: Path, script: Script, times: int = 1, timeout_s: float = 5.0, closes: bool = False
) -> tuple[list[Answer], PlayedServer]:
    """So many requests, one after the other."""

    async def run() -> tuple[list[Answer], PlayedServer]:
        async with playing(path / "s", script) as (played, target):
            played.closes = closes
            connections = Connections(target)
            request = target.request("POST", "/v1/completions", b"{}")
            answers = []
            for _ in range(times):
                answers.append(await connections.ask(request, timeout_s))
                await asyncio.sleep(0.01)
            connections.close()
            return answers, played

    return asyncio.run(run())


@pytest.mark.parametrize("size", [1, 2, 7, 1 << 20])
def test_an_answer_in_pieces_of_any_size(tmp_path: Path, size: int) -> None:
    (answer,), _ = ask(tmp_path, lambda body: [chunked(THREE, size)])
    assert answer.error is None
    assert (answer.events, answer.prompt_tokens, answer.new_tokens) == (3, 7, 9)
    assert len(answer.gaps) == 2 and answer.began < answer.first <= answer.last


def test_lines_may_end_as_on_windows_and_comments_are_no_events(tmp_path: Path) -> None:
    body = b": hello\r\n\r\n" + THREE.replace(b"\n", b"\r\n")
    (answer,), _ = ask(tmp_path, lambda _: [chunked(body)])
    assert answer.error is None and answer.events == 3


def test_times_are_those_of_the_events(tmp_path: Path) -> None:
    def script(body: bytes) -> list[bytes | float]:
        head = HEAD + b"Content-Length: %d\r\n\r\n" % len(THREE)
        rest = text("c", "length") + usage(7, 9) + DONE
        return [head, 0.1, text("a"), 0.2, text("b"), 0.05, rest]

    (answer,), _ = ask(tmp_path, script)
    assert answer.first - answer.began == pytest.approx(0.1, abs=0.04)
    assert answer.gaps == pytest.approx([0.2, 0.05], abs=0.04)
    assert answer.last - answer.first == pytest.approx(0.25, abs=0.05)


def test_chat_begins_with_its_first_text(tmp_path: Path) -> None:
    def delta(finish: str | None = None, **fields: object) -> bytes:
        return event(choices=[{"index": 0, "delta": fields, "finish_reason": finish}])

    def script(body: bytes) -> list[bytes | float]:
        first = delta(role="assistant", content="")
        rest = delta(reasoning_content="hm") + delta(content="a") + delta("stop") + DONE
        head = HEAD + b"Content-Length: %d\r\n\r\n" % len(first + rest)
        return [head + first, 0.1, rest]

    (answer,), _ = ask(tmp_path, script)
    assert answer.error is None and answer.events == answer.new_tokens == 2
    assert answer.first - answer.began > 0.09


def test_connections_are_kept_and_replaced(tmp_path: Path) -> None:
    answers, played = ask(tmp_path, lambda body: [chunked(THREE)], times=4)
    assert [each.error for each in answers] == [None] * 4 and played.connections == 1
    answers, played = ask(tmp_path, lambda body: [chunked(THREE)], times=3, closes=True)
    assert [each.error for each in answers] == [None] * 3 and played.connections == 3


def test_a_kept_connection_that_dies_under_a_request(tmp_path: Path) -> None:
    """The server had closed it just then: the request goes again on a new one."""

    async def run() -> tuple[Answer, Answer, PlayedServer]:
        script: Script = lambda body: [chunked(THREE)]  # noqa: E731
        async with playing(tmp_path / "s", script) as (played, target):
            connections = Connections(target)
            request = target.request("POST", "/", b"{}")
            first = await connections.ask(request, 5)
            played.closes = True
            played._script = lambda body: [] if len(played.bodies) == 2 else [chunked(THREE)]
            return first, await connections.ask(request, 5), played

    first, second, played = asyncio.run(run())
    assert first.error is None and second.error is None
    assert len(played.bodies) == 3 and played.connections == 2


def test_a_body_without_a_length(tmp_path: Path) -> None:
    (answer,), _ = ask(tmp_path, lambda body: [HEAD + b"\r\n" + THREE], closes=True)
    assert answer.error is None and answer.events == 3


@pytest.mark.parametrize(
    ("written", "error"),
    [
        (sized(b'{"error": {"message": "too long"}}', b"400 Bad Request"), "HTTP 400: too long"),
        (sized(b"oh no", b"500 Fault"), "HTTP 500: oh no"),
        (sized(b'{"detail": "no"}', b"422 What"), "HTTP 422: no"),
        (chunked(text("a") + event(error={"message": "a fault"}) + DONE), "a fault"),
        (chunked(text("a")), "the answer has no end"),
        (chunked(b"data: {nonsense}\n\n" + DONE), "an event cannot be read"),
        (HEAD + b"Content-Length: 999\r\n\r\n" + text("a"), "the connection broke"),
        (b"SSH-2.0-OpenSSH\r\n", "does not speak HTTP/1.1"),
        (b"", "the connection broke"),
    ],
)
def test_what_goes_wrong_is_an_error(tmp_path: Path, written: bytes, error: str) -> None:
    (answer,), _ = ask(tmp_path, lambda body: [written], closes=True)
    assert answer.error is not None and error in answer.error


def test_a_server_that_is_silent(tmp_path: Path) -> None:
    began = time.monotonic()
    (answer,), _ = ask(tmp_path, lambda body: [0.4], timeout_s=0.2)
    assert answer.error == "no whole answer within 0.2 s" and time.monotonic() - began < 2


def test_nobody_there(tmp_path: Path) -> None:
    target = Target("localhost", 80, str(tmp_path / "none"))
    answer = asyncio.run(Connections(target).ask(b"", 1))
    assert answer.error is not None and "no connection to" in answer.error


def test_requests_say_where_they_go() -> None:
    target = Target.parse("https://[::1]:8443/openai/", None, "secret")
    assert (target.host, target.port, target.tls, target.prefix) == ("::1", 8443, True, "/openai")
    head, _, body = target.request("POST", "/v1/completions", b"{}").partition(b"\r\n\r\n")
    assert head.splitlines()[0] == b"POST /openai/v1/completions HTTP/1.1" and body == b"{}"
    assert b"Host: [::1]:8443" in head and b"Authorization: Bearer secret" in head
    assert Target.parse("http://a", None, None).port == 80
    for wrong in ("localhost:8000", "ftp://a", "http://a:b", "http://"):
        with pytest.raises(BenchError, match="give http://HOST:PORT"):
            Target.parse(wrong, None, None)
