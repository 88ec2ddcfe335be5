"""Whatever is posted, the answer is an answer: no status of 500, and the gateway serves on."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from .played import PlayedLink, post
from .serving import Bare, Serving

_SCALARS = st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats(-3, 3) | st.text("a\n€")
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "1"]), inner)
    ),
    max_leaves=6,
)
_FIELDS = st.sampled_from(
    ["prompt", "messages", "n", "stop", "echo", "logprobs", "top_logprobs", "stream", "model",
     "stream_options", "max_tokens", "max_completion_tokens", "logit_bias", "prompt_logprobs",
     "add_special_tokens", "tokens", "priority", "request_id", "tools", "response_format"]
)  # fmt: skip
_PATHS = st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])


def _ids_in_vocabulary(value: Any) -> Any:
    """The played node's ids are characters; a real router refuses those that there are not."""
    if isinstance(value, list):
        return [_ids_in_vocabulary(each) for each in value]
    return min(value, 5000) if isinstance(value, int) else value


@settings(max_examples=250, deadline=None)
@example("/v1/chat/completions", {"messages": []})
@example("/v1/completions", {"prompt": [1114112]})
@example("/tokenize", {"prompt": None, "messages": []})
@given(_PATHS, st.dictionaries(_FIELDS, _VALUES, max_size=4))
def test_any_body_has_an_answer(path: str, extra: dict[str, Any]) -> None:
    body = {
        "/v1/completions": {"prompt": "a"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
        "/tokenize": {"prompt": "a"},
        "/detokenize": {"tokens": [97]},
    }[path] | extra
    if isinstance(body.get("max_tokens"), int):
        body["max_tokens"] = min(body["max_tokens"], 20)
    if isinstance(body.get("max_completion_tokens"), int):
        body["max_completion_tokens"] = min(body["max_completion_tokens"], 20)
    if isinstance(body.get("n"), int):
        body["n"] = min(body["n"], 5)
    for name in ("tokens", "prompt"):
        if isinstance(body.get(name), list):
            body[name] = _ids_in_vocabulary(body[name])
    status = post(path, json.dumps(body).encode()).status_code
    assert status in (200, 400, 404), (status, body)


def test_bytes_of_any_kind_do_not_end_the_server(tmp_path: Path) -> None:
    rng = random.Random(7)
    serving = Serving(PlayedLink(), tmp_path / "s")
    good = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b'Content-Length: 32\r\n\r\n{"prompt": "a", "max_tokens": 1}'
    )
    try:
        for _ in range(200):
            data = bytearray(good)
            for _ in range(rng.randrange(1, 6)):
                place = rng.randrange(len(data))
                match rng.randrange(3):
                    case 0:
                        data[place] = rng.randrange(256)
                    case 1:
                        del data[place : place + rng.randrange(1, 20)]
                    case _:
                        data[place:place] = rng.randbytes(rng.randrange(1, 20))
            bare = Bare(serving)
            bare.socket.settimeout(0.02)
            bare.socket.sendall(bytes(data))
            with contextlib.suppress(TimeoutError, ConnectionError):
                assert not bare.socket.recv(4096).startswith(b"HTTP/1.1 5"), data
            bare.close()
        bare = Bare(serving)
        bare.socket.sendall(good)
        assert b"200 OK" in bare.until(b"\r\n")
    finally:
        serving.stop()
