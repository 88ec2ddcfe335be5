"""Work for the tokenizer: bounded, in order, and it survives the tokenizer's death."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from albireo.ipc.grammars import Grammar
from albireo.ipc.messages import (
    Decoded,
    DecodeIds,
    EncodeChat,
    Encoded,
    EncodeText,
    TextFailed,
    TokenizerDown,
)
from albireo.ipc.protocol import ChatMessage
from albireo.ipc.template import TemplateOptions
from albireo.ipc.tools import Tool, ToolCall, Tools
from albireo.router import texts as texts_module
from albireo.router.requests import Refusal
from albireo.router.texts import (
    ANSWER_TIMEOUT_S,
    MAX_BYTES,
    MAX_OUTSTANDING,
    MAX_OUTSTANDING_BYTES,
    MAX_TRIES,
    TextQueue,
)
from albireo.router.validate import MAX_TOKENIZE_BYTES

from .conftest import Neighbourhood
from .fakes import CONTEXT

Start = Callable[..., Neighbourhood]


def test_tokenize_and_detokenize_are_answered(start: Start) -> None:
    near = start()
    tokenizer = near.tokenizer()
    client = near.client()
    client.send(type="tokenize", id=1, text="hi", add_special_tokens=False)
    message = tokenizer.expect(EncodeText)
    assert message.text == "hi" and not message.add_special_tokens
    tokenizer.send(Encoded(message.key, [1, 2]))
    assert client.receive() == {"type": "tokens", "id": 1, "token_ids": [1, 2]}
    client.send(type="tokenize", id=2, messages=[{"role": "user", "content": "x"}])
    tokenizer.send(Encoded(tokenizer.expect(EncodeChat).key, [3]))
    assert client.receive()["token_ids"] == [3]
    client.send(type="detokenize", id=3, token_ids=[4, 5], skip_special_tokens=True)
    message = tokenizer.expect(DecodeIds)
    assert message.token_ids == [4, 5] and message.skip_special_tokens
    tokenizer.send(Decoded(message.key, "four five"))
    assert client.receive() == {"type": "text", "id": 3, "text": "four five"}


def test_the_tokenizer_is_told_what_a_prompt_has_to_fit_into(start: Start) -> None:
    near = start()
    tokenizer = near.tokenizer()
    client = near.client()
    said = [{"role": "user", "content": "x"}]
    client.send(type="generate", id=1, prompt="x")
    assert tokenizer.expect(EncodeText).context == CONTEXT
    client.send(type="chat", id=2, messages=said)
    message = tokenizer.expect(EncodeChat)
    assert message.context == CONTEXT
    tokenizer.send(TextFailed(message.key, "too_long", "no room", "prompt"))
    assert client.expect_error("too_long", 2)["param"] == "prompt"
    client.send(type="tokenize", id=3, text="x")
    assert tokenizer.expect(EncodeText).context == 0
    client.send(type="tokenize", id=4, messages=said)
    assert tokenizer.expect(EncodeChat).context == 0
    template = {"variables": {"enable_thinking": False}, "add_generation_prompt": False}
    for kind in ("chat", "tokenize"):
        said = [{"role": "user", "content": "a"}]
        client.send(type=kind, id=7, messages=said, template=template | {"variables": {"tools": 1}})
        error = client.expect_error("invalid_request", 7)
        assert error["param"] == "template" and "'tools'" in error["message"]
        client.send(type=kind, id=8, messages=said, template=template)
        message = tokenizer.expect(EncodeChat)
        assert message.template == msgspec.convert(template, TemplateOptions)
        tokenizer.send(TextFailed(message.key, "invalid_request", "no"))
        client.expect_error("invalid_request", 8)


def test_what_need_not_fit_the_context_has_a_limit_of_its_own(start: Start) -> None:
    near = start()
    tokenizer = near.tokenizer()
    client = near.client()
    client.send(type="tokenize", id=1, text="é" * (MAX_TOKENIZE_BYTES // 2) + "x")
    error = client.expect_error("invalid_request", 1)
    assert f"the text has {MAX_TOKENIZE_BYTES + 1} bytes; at most" in error["message"]
    assert error["param"] == "text"
    call = {"id": "1", "name": "f", "arguments": "x" * MAX_TOKENIZE_BYTES}
    said = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    client.send(type="tokenize", id=2, messages=said)
    assert client.expect_error("invalid_request", 2)["param"] == "messages"
    assert tokenizer.silent()
    client.send(type="tokenize", id=3, text="é" * (MAX_TOKENIZE_BYTES // 2))
    tokenizer.expect(EncodeText)


def test_at_most_64_texts_are_with_the_tokenizer(start: Start) -> None:
    near = start()
    tokenizer = near.tokenizer()
    client = near.client()
    for number in range(100):
        client.send(type="tokenize", id=number, text=f"text {number}")
    messages = [tokenizer.expect(EncodeText) for _ in range(MAX_OUTSTANDING)]
    assert [each.text for each in messages] == [f"text {n}" for n in range(MAX_OUTSTANDING)]
    assert tokenizer.silent()
    tokenizer.send(Encoded(messages[0].key, [1]))
    assert tokenizer.expect(EncodeText).text == f"text {MAX_OUTSTANDING}"
    assert tokenizer.silent()


def test_a_new_tokenizer_gets_what_the_dead_one_had(start: Start) -> None:
    near = start()
    tokenizer = near.tokenizer()
    supervisor = near.supervisor()
    client = near.client()
    for number in range(3):
        client.send(type="tokenize", id=number, text=f"text {number}")
    first = tokenizer.expect(EncodeText)
    tokenizer.expect(EncodeText)
    tokenizer.send(Encoded(first.key, [0]))
    assert client.receive()["id"] == 0
    tokenizer.close()
    supervisor.send(TokenizerDown(0))
    client.send(type="tokenize", id=3, text="text 3")
    successor = near.tokenizer(incarnation=1)
    for number in (1, 2, 3):
        message = successor.expect(EncodeText)
        assert message.text == f"text {number}"
        # Those that were with the dead one go one at a time: one of them may have killed it.
        assert number > 1 or successor.silent()
        successor.send(Encoded(message.key, [number]))
        assert client.receive()["token_ids"] == [number]


def test_a_tokenizer_that_joins_replaces_the_one_before(start: Start) -> None:
    near = start()
    client = near.client()
    old = near.tokenizer()
    client.send(type="tokenize", id=1, text="a")
    key = old.expect(EncodeText).key
    new = near.tokenizer(incarnation=1)
    assert new.expect(EncodeText).key == key


def test_a_restarted_router_finds_the_tokenizer_that_was_there_before(start: Start) -> None:
    near = start(incarnation=1)
    tokenizer = near.tokenizer(incarnation=5, join=False)
    client = near.client()
    client.send(type="tokenize", id=1, text="a")
    near.supervisor().topology("ready", tokenizer=5)
    message = tokenizer.expect(EncodeText)
    tokenizer.send(Encoded(message.key, [7]))
    assert client.receive()["token_ids"] == [7]


class Recorder:
    """A tokenizer's mailbox, and the answers of jobs by name."""

    def __init__(self) -> None:
        self.there = True
        self.sent: list[Any] = []
        self.answers: dict[str, Any] = {}
        self.now = 0.0
        self.queue = TextQueue(self.send, lambda: self.now, first_key=0)

    def send(self, peer: bytes, message: Any) -> bool:
        if self.there:
            self.sent.append(message)
        return self.there

    def ask(self, text: str, tenant: str = "") -> Any:
        return self.queue.encode_text(
            text, True, lambda answer: self.answers.update({text: answer}), tenant=tenant
        )

    def answer_next(self) -> None:
        """The tokenizer answers the first text that it has been sent."""
        self.queue.answer(Encoded(self.sent.pop(0).key, [1]))


def test_a_text_that_kills_every_tokenizer_is_given_up_and_the_others_are_not() -> None:
    recorder = Recorder()
    queue = recorder.queue
    queue.joined(b"tokenizer.0", 0)
    for text in ("poison", "good", "better"):
        recorder.ask(text)
    assert [each.text for each in recorder.sent] == ["poison", "good", "better"]
    for death in range(1, MAX_TRIES):
        queue.down(death - 1)
        recorder.sent.clear()
        queue.joined(b"tokenizer", death)
        assert [each.text for each in recorder.sent] == ["poison"]
    queue.down(MAX_TRIES - 1)
    assert isinstance(recorder.answers["poison"], TextFailed)
    recorder.sent.clear()
    queue.joined(b"tokenizer", MAX_TRIES)
    for text in ("good", "better"):
        queue.answer(Encoded(recorder.sent[-1].key, [1]))
        assert isinstance(recorder.answers[text], Encoded)
    recorder.ask("a")
    recorder.ask("b")
    assert [each.text for each in recorder.sent] == ["good", "better", "a", "b"]


def test_a_hanging_tokenizer_is_not_waited_for_for_ever() -> None:
    recorder = Recorder()
    recorder.queue.joined(b"tokenizer.0", 0)
    for number in range(MAX_OUTSTANDING + 1):
        recorder.ask(f"{number}")
    recorder.now = 10.0
    recorder.ask("later")
    recorder.now = ANSWER_TIMEOUT_S - 0.1
    recorder.queue.expire()
    assert not recorder.answers
    recorder.now = ANSWER_TIMEOUT_S
    recorder.queue.expire()
    assert len(recorder.answers) == MAX_OUTSTANDING + 1
    assert {answer.code for answer in recorder.answers.values()} == {"unavailable"}
    # An answer that comes after all makes room for those that wait.
    recorder.queue.answer(Encoded(recorder.sent[0].key, [1]))
    assert recorder.sent[-1].text == "later"
    assert recorder.answers["0"].code == "unavailable"


def test_what_waits_is_bounded_in_bytes_and_cancelling_frees_it() -> None:
    recorder = Recorder()
    half = "x" * (MAX_BYTES // 2 - 50)
    job = recorder.ask(half)
    recorder.ask(half)
    with pytest.raises(Refusal, match="2 texts with 671088") as refusal:
        recorder.ask("y" * 100)
    assert refusal.value.code == "queue_full" and refusal.value.retry
    recorder.queue.cancel(job)
    recorder.ask("y")
    assert len(recorder.queue) == 2


def test_what_the_tokenizer_has_is_bounded_in_bytes_so_that_the_rest_can_be_cancelled() -> None:
    recorder = Recorder()
    recorder.queue.joined(b"tokenizer.0", 0)
    large = ["x" * (MAX_OUTSTANDING_BYTES + number) for number in range(3)]
    jobs = [recorder.ask(each) for each in large]
    recorder.ask("small")
    assert [each.text for each in recorder.sent] == large[:1]
    for job in jobs:
        recorder.queue.cancel(job)
    recorder.answer_next()
    assert [each.text for each in recorder.sent] == ["small"]
    assert not recorder.answers
    recorder.ask("y" * (MAX_OUTSTANDING_BYTES // 2))
    recorder.ask("z" * (MAX_OUTSTANDING_BYTES // 2))
    assert [each.text[0] for each in recorder.sent] == ["s", "y"]
    recorder.answer_next()
    assert [each.text[0] for each in recorder.sent] == ["y"]
    recorder.answer_next()
    assert [each.text[0] for each in recorder.sent] == ["z"]


def test_tenants_take_turns() -> None:
    recorder = Recorder()
    for number in range(3):
        recorder.ask(f"a{number}" + "x" * MAX_OUTSTANDING_BYTES, "alice")
    recorder.queue.joined(b"tokenizer.0", 0)
    recorder.ask("b0", "bob")
    gone = recorder.ask("b1", "bob")
    recorder.ask("b2" + "x" * MAX_OUTSTANDING_BYTES, "bob")
    recorder.ask("c0" + "x" * MAX_OUTSTANDING_BYTES, "carol")
    recorder.queue.cancel(gone)
    order = []
    while recorder.sent:
        order += [each.text[:2] for each in recorder.sent]
        for _ in list(recorder.sent):
            recorder.answer_next()
    # Nobody has two turns in a row while another waits, nor a third before another's first.
    assert order == ["a0", "b0", "a1", "c0", "b2", "a2"]


def test_every_text_has_its_time_whoever_waits_ahead() -> None:
    recorder = Recorder()
    recorder.ask("a0", "alice")
    recorder.now = 10.0
    recorder.ask("b0", "bob")
    recorder.ask("a1", "alice")
    recorder.now = ANSWER_TIMEOUT_S
    recorder.queue.expire()
    assert list(recorder.answers) == ["a0"]
    recorder.now += 10.0
    recorder.queue.expire()
    assert sorted(recorder.answers) == ["a0", "a1", "b0"]
    assert not len(recorder.queue)


def test_a_text_is_of_the_tenant_of_its_request(start: Start) -> None:
    near = start()
    tokenizer = near.tokenizer()
    client, other = near.client(), near.client()
    large = "x" * MAX_OUTSTANDING_BYTES
    said = [{"role": "user", "content": "chat"}]
    client.send(type="tokenize", id=1, text=large)
    first = tokenizer.expect(EncodeText)
    client.send(type="tokenize", id=2, text=large)
    client.send(type="generate", id=3, prompt="bob's " + large, tenant="bob")
    client.send(type="chat", id=4, messages=said, tenant="carol")
    client.send(type="tokenize", id=8, text="dave's", tenant="dave")
    client.send(type="models", id=5)
    assert client.receive()["id"] == 5
    other.send(type="detokenize", id=6, token_ids=[1])
    other.send(type="models", id=7)
    assert other.receive()["id"] == 7
    tokenizer.send(Encoded(first.key, [1]))
    bobs = tokenizer.expect(EncodeText)
    assert bobs.text.startswith("bob's")
    tokenizer.send(Encoded(bobs.key, [1]))
    second = tokenizer.expect(EncodeText)
    assert second.text == large
    tokenizer.send(Encoded(second.key, [1]))
    tokenizer.expect(EncodeChat)
    assert tokenizer.expect(EncodeText).text == "dave's"
    tokenizer.expect(DecodeIds)


BIG = "x" * 600
CALL = ToolCall(id="1", name="f", arguments=BIG)
SCHEMA = {"type": "object", "description": BIG}


def said(**more: Any) -> dict[str, Any]:
    return {"messages": [ChatMessage(role="assistant", content="", **more)]}


@pytest.mark.parametrize(
    "asked",
    [
        {"text": BIG},
        {"text": "", "words": (BIG,)},
        {"text": "", "grammar": Grammar(lark=BIG)},
        {"text": "", "grammar": Grammar(json_schema=SCHEMA)},
        said(tool_calls=(CALL,)),
        said(tool_call_id=BIG),
        said(name=BIG),
        said() | {"words": (BIG,)},
        said() | {"tools": Tools(functions=(Tool(name="f", parameters=SCHEMA),))},
    ],
    ids=lambda asked: "-".join(asked),
)
def test_all_that_a_request_brings_along_is_counted(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    monkeypatch.setattr(texts_module, "MAX_BYTES", 1000)
    queue = Recorder().queue

    def ask() -> Any:
        if "text" in asked:
            return queue.encode_text(add_special_tokens=True, done=print, **asked)
        return queue.encode_chat(done=print, **asked)

    job = ask()
    with pytest.raises(Refusal, match="1 texts with"):
        ask()
    queue.cancel(job)
    ask()


def test_a_tokenizer_that_cannot_be_reached_is_tried_again() -> None:
    recorder = Recorder()
    recorder.there = False
    recorder.queue.joined(b"tokenizer.0", 0)
    recorder.ask("a")
    recorder.there = True
    recorder.queue.retry()
    assert [each.text for each in recorder.sent] == ["a"]
