"""Random and mutated frames at the socket: always an answer or a close, never a crash."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .fakes import Automatic, RawClient, RouterThread, make_spec

SEEDS: list[dict[str, Any]] = [
    {"type": "generate", "id": 1, "prompt_ids": [101, 102], "params": {"max_tokens": 2}},
    {"type": "generate", "id": 2, "prompt": "abc", "params": {"stop": ["x"], "seed": 3}},
    {"type": "chat", "id": 3, "messages": [{"role": "user", "content": "hi"}]},
    {"type": "cancel", "id": 1},
    {"type": "tokenize", "id": 4, "text": "abc"},
    {"type": "detokenize", "id": 5, "token_ids": [101]},
    {"type": "models", "id": 6},
    {"type": "status", "id": 7},
    {"type": "hello", "protocol": 1},
]

CALM = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """A valid message with fields replaced, added or removed."""
    message = dict(draw(st.sampled_from(SEEDS)))
    for name in draw(st.lists(st.sampled_from(sorted({*message, "params", "extra"})), max_size=2)):
        if draw(st.booleans()):
            message[name] = draw(values)
        else:
            message.pop(name, None)
    return msgspec.msgpack.encode(message)


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """A frame that may be torn: changed bytes, a wrong length, or just noise."""
    payload = bytearray(draw(messages() | st.binary(max_size=60)))
    for place in draw(st.lists(st.integers(0, 200), max_size=3)):
        if payload:
            payload[place % len(payload)] = draw(st.integers(0, 255))
    length = len(payload)
    if draw(st.integers(0, 9)) == 0:
        length = draw(st.integers(0, 2**32 - 1))
    return struct.pack("<I", length) + bytes(payload)


@pytest.fixture(scope="module")
def router() -> Iterator[RouterThread]:
    with tempfile.TemporaryDirectory(prefix="alb") as path:
        router = RouterThread(make_spec(Path(path)))
        automatic = Automatic(router.spec)
        yield router
        automatic.stop()
        router.stop()


def read_to_the_end(client: RawClient) -> list[dict[str, Any]]:
    """Says that nothing more comes, and takes all answers until the router closes."""
    answers = []
    try:
        while True:
            answers.append(client.receive())
            assert answers[-1]["type"] in {
                "welcome", "deltas", "tokens", "text", "model_list", "node_status", "error"
            }  # fmt: skip
            if answers[-1] == {"type": "text", "id": 999_999, "text": "e"}:
                return answers
    except (EOFError, ConnectionError):
        return answers


@settings(CALM, max_examples=400)
@given(st.lists(frames(), min_size=1, max_size=6), st.booleans())
def test_whatever_comes_is_answered_or_ends_the_connection(
    router: RouterThread, stream: list[bytes], greet: bool
) -> None:
    client = RawClient(router, hello=greet)
    try:
        client.socket.sendall(b"".join(stream))
        # A torn length swallows this; then the frame is completed and ends as an error.
        client.send(type="detokenize", id=999_999, token_ids=[201])
        client.socket.settimeout(0.02)
        read_to_the_end(client)
    except (TimeoutError, BrokenPipeError, ConnectionResetError):
        pass  # It waits for the rest of an announced frame, or has closed: both are right.
    finally:
        client.close()
    assert router.alive


@settings(CALM, max_examples=300)
@given(messages())
def test_a_whole_frame_always_leaves_a_working_connection(
    router: RouterThread, payload: bytes
) -> None:
    client = RawClient(router)
    client.send_payload(payload)
    client.send(type="detokenize", id=999_999, token_ids=[201])
    assert read_to_the_end(client)[-1] == {"type": "text", "id": 999_999, "text": "e"}
    client.close()


def test_the_router_is_whole_after_all_that(router: RouterThread) -> None:
    client = RawClient(router)
    client.send(type="generate", id=1, prompt="abc", params={"max_tokens": 3})
    assert "".join(delta[3] for delta in client.receive_deltas(1)) == "abc"
    for _ in range(100):
        client.send(type="status", id=2)
        status = client.receive()["status"]
        if status["connections"] == 1 and status["requests"]["in_flight"] == 0:
            break
    assert status["connections"] == 1 and status["requests"]["in_flight"] == 0
    client.close()
