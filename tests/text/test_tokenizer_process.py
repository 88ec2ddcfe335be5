"""The tokenizer process: answers, and what a bad request cannot do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from albireo.ipc import link
from albireo.ipc.link import Hub
from albireo.ipc.messages import (
    Decoded,
    DecodeIds,
    EncodeChat,
    Encoded,
    EncodeText,
    Joined,
    TextFailed,
    ToRouter,
)
from albireo.ipc.protocol import ChatMessage
from albireo.ipc.template import TemplateOptions
from albireo.workers.tokenizer import process as tokenizer
from albireo.workers.tokenizer.chat_template import ChatTemplate

from .running_process import DEADLINE_S, MODEL, FakeActor, Running, actor_spec, receive
from .test_request import byte_tokens


@pytest.fixture
def router_of_tokenizer(tmp_path: Path) -> Iterator[Hub[Any]]:
    with running_tokenizer(tmp_path) as (hub, _):
        yield hub


@contextmanager
def running_tokenizer(directory: Path) -> Iterator[tuple[Hub[Any], FakeActor]]:
    """The router's end of a tokenizer process, and its actor."""
    spec = actor_spec(directory, "tokenizer")
    hub: Hub[Any] = Hub(spec.socket_path("router"), ToRouter)
    actor = FakeActor(spec)
    running = Running(tokenizer.main, actor, {})
    assert receive(hub) == [Joined("tokenizer", -1, 3, os.getpid())]
    assert actor.is_ready.wait(DEADLINE_S)
    yield hub, actor
    running.stop()
    hub.close()


def ask(hub: Hub[Any], request: Any) -> Any:
    hub.send(b"tokenizer.3", request)
    return receive(hub)[0]


def test_tokenizer_answers(router_of_tokenizer: Hub[Any]) -> None:
    hub = router_of_tokenizer
    plain = byte_tokens("a")
    assert ask(hub, EncodeText(5, "a", True)) == Encoded(5, [0, *plain])
    assert ask(hub, EncodeText(6, "a", False)) == Encoded(6, plain)
    chat = ask(hub, EncodeChat(7, [ChatMessage(role="user", content="a")]))
    assert MODEL.decode(chat.token_ids, False) == "<|begin|>[INST] a [/INST]"
    assert ask(hub, DecodeIds(8, [0, *plain], True)) == Decoded(8, "a")
    said = [ChatMessage(role="user", content="a"), ChatMessage(role="assistant", content="b")]
    going_on = TemplateOptions(variables={"eos_token": "."}, continue_final_message=True)
    chat = ask(hub, EncodeChat(9, said, template=going_on))
    assert MODEL.decode(chat.token_ids, False) == "<|begin|>[INST] a [/INST]b"


def test_a_bad_request_harms_nobody(router_of_tokenizer: Hub[Any]) -> None:
    hub = router_of_tokenizer
    refused = ask(hub, EncodeChat(1, [ChatMessage(role="assistant", content="a")]))
    assert (refused.key, refused.code) == (1, "invalid_request")
    assert "roles must alternate" in refused.message
    assert ask(hub, EncodeChat(2, [])).code == "invalid_request"
    unknown = ask(hub, DecodeIds(3, [10**6], True))
    assert unknown == TextFailed(3, "invalid_request", unknown.message)
    assert "token id 1000000 is outside" in unknown.message
    assert ask(hub, EncodeText(4, "a", False)) == Encoded(4, byte_tokens("a"))


def test_whoever_tokenizes_a_long_text_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(_text: str, _add_special_tokens: bool) -> list[int]:
        busy.append(actor.is_busy)
        return []

    busy: list[bool] = []
    monkeypatch.setattr(MODEL, "encode", encode)
    with running_tokenizer(tmp_path) as (hub, actor):
        ask(hub, EncodeText(1, "a", False))
        ask(hub, EncodeText(2, "b", False))
        assert busy == [True, True]
        assert not actor.is_busy


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def encode(text: str, add_special_tokens: bool) -> list[int]:
        encoded.append(text)
        return []

    encoded: list[str] = []
    monkeypatch.setattr(MODEL, "encode", encode)
    longest = MODEL.longest_token
    fits = "é" * (99 * longest // 2)
    over = fits + "é" * longest
    failed = tokenizer.answer(MODEL, EncodeText(1, over, True, context=100))
    assert failed == TextFailed(
        1,
        "too_long",
        f"the prompt has {101 * longest} bytes, which are 101 tokens at least; the context holds "
        f"100, and 1 at least must be left to generate: shorten the prompt by {2 * longest} bytes "
        "or more",
        "prompt",
    )
    said = [ChatMessage(role="user", content=over)]
    assert tokenizer.answer(MODEL, EncodeChat(2, said, context=100)).code == "too_long"
    assert not encoded
    assert tokenizer.answer(MODEL, EncodeText(3, fits, True, context=100)) == Encoded(3, [])
    assert tokenizer.answer(MODEL, EncodeText(4, over, True)) == Encoded(4, [])
    # A template may leave out what it was given, as white space around it.
    said = [ChatMessage(role="user", content=" " * len(over.encode()))]
    monkeypatch.setattr(MODEL, "_template", ChatTemplate("{{ messages[0].content | trim }}", {}))
    assert tokenizer.answer(MODEL, EncodeChat(5, said, context=100)) == Encoded(5, [])
    # Where tokens may swallow any number of characters, only tokenizing tells.
    monkeypatch.setattr(MODEL, "longest_token", 0)
    assert tokenizer.answer(MODEL, EncodeText(6, over, True, context=100)) == Encoded(6, [])


def test_an_answer_that_is_too_large_for_a_message_is_refused(
    router_of_tokenizer: Hub[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = router_of_tokenizer
    monkeypatch.setattr(link, "MAX_MESSAGE_BYTES", 2000)
    failed = ask(hub, DecodeIds(3, [0] * 500, False))
    assert (failed.key, failed.code) == (3, "invalid_request")
    assert failed.message.endswith("the limit is 2000: split the request")
    assert ask(hub, DecodeIds(4, byte_tokens("a"), True)) == Decoded(4, "a")


def test_a_panic_in_the_library_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        pass

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        raise Panic("index out of bounds")

    monkeypatch.setattr(MODEL, "encode", encode)
    failed = tokenizer.answer(MODEL, EncodeText(9, "a", False))
    assert failed == TextFailed(9, "internal", "the tokenizer failed: Panic: index out of bounds")
