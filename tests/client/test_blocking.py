"""Client, the library's face for threads: what it returns, raises, cancels and shares."""

from __future__ import annotations

import gc
import select
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from albireo.client import (
    ChatMessage,
    Choice,
    Client,
    Completion,
    ConnectionLost,
    InvalidRequest,
    NodeNotRunning,
    SamplingParams,
    TimedOut,
    TooLarge,
    TooLong,
    Unavailable,
)

from ..router.fakes import EOS, WAIT_S, encode
from .conftest import PlayedNode

STUCK = [999, 1]
HALF = [998, 1]


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_generate_returns_text_ids_reason_and_usage(node: PlayedNode) -> None:
    with Client.connect(node.path) as client:
        answer = client.generate("abc", max_tokens=7)
        fields = "abcabca", encode("abcabca"), "length", None
        assert answer == Completion(*fields, answer.usage, choices=[Choice(*fields)])
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 7)
        assert answer.usage.total_tokens == 10
        assert client.generate(encode("xy"), SamplingParams(max_tokens=3)).text == "xyx"
        assert client.generate("a").usage.completion_tokens == 16
        assert client.welcome.model == "fake-model" and client.welcome.vocab_size == 1000


def test_keywords_go_before_params(node: PlayedNode) -> None:
    with Client.connect(node.path) as client:
        params = SamplingParams(max_tokens=9, temperature=0.5)
        assert len(client.generate("abc", params, max_tokens=2).token_ids) == 2
        assert len(client.generate("abc", params, stop="q").token_ids) == 9


def test_stream_gives_deltas_up_to_the_end(node: PlayedNode) -> None:
    with Client.connect(node.path) as client:
        deltas = list(client.stream("abc", max_tokens=5))
        assert "".join(delta.text for delta in deltas) == "abcab"
        assert [delta.index for delta in deltas] == list(range(5))
        assert [delta.end is not None for delta in deltas] == [False] * 4 + [True]
        assert deltas[-1].end is not None and deltas[-1].end.finish_reason == "length"


def test_chat(node: PlayedNode) -> None:
    with Client.connect(node.path) as client:
        messages = [{"role": "user", "content": "hello"}]
        assert client.chat(messages, max_tokens=5).text == "hello"
        # Without max_tokens it is what is left of the context of 128.
        assert client.chat(messages).usage.total_tokens == 128
        stream = client.chat([ChatMessage(role="user", content="hi")], stream=True, max_tokens=2)
        assert "".join(delta.text for delta in stream) == "hi"
        with pytest.raises(InvalidRequest, match="no such role"):
            client.chat([{"role": "nobody", "content": "x"}])


@pytest.mark.parametrize(
    ("terms", "param"),
    [({"priority": 1001}, "priority"), ({"tenant": "x" * 257}, "tenant"),
     ({"cache_salt": "x" * 257}, "cache_salt"), ({"priority": "high"}, None)],
)  # fmt: skip
def test_whose_turn_it_is_and_who_shares_goes_with_every_request(
    node: PlayedNode, terms: dict[str, Any], param: str | None
) -> None:
    with Client.connect(node.path) as client:
        hello = [{"role": "user", "content": "hello"}]
        assert client.generate("ab", max_tokens=2, priority=-3, tenant="a", cache_salt="b").text
        assert client.chat(hello, max_tokens=2, priority=-3, tenant="a", cache_salt="b").text
        for ask in (
            lambda: client.generate("ab", **terms),
            lambda: list(client.stream("ab", **terms)),
            lambda: client.chat(hello, **terms),
            lambda: list(client.chat(hello, stream=True, **terms)),
        ):
            with pytest.raises(InvalidRequest) as caught:
                ask()
            assert caught.value.param == param


def test_the_rest_of_the_services(node: PlayedNode) -> None:
    with Client.connect(node.path) as client:
        assert client.tokenize("abc") == encode("abc")
        assert client.tokenize([{"role": "user", "content": "de"}]) == encode("de")
        assert client.detokenize(encode("abc")) == "abc"
        [card] = client.models()
        assert (card.id, card.max_model_len) == ("fake-model", 128)
        status = client.status()
        assert status["node"] == "test" and len(status["groups"]) == 2


def test_many_threads_share_a_connection(node: PlayedNode) -> None:
    with Client.connect(node.path) as client, ThreadPoolExecutor(32) as pool:
        texts = [f"text number {number}" for number in range(100)]
        answers = pool.map(lambda text: client.generate(text, max_tokens=len(text)).text, texts)
        assert list(answers) == texts


@pytest.mark.parametrize("leave", ["close", "break", "with"])
def test_leaving_a_stream_early_cancels_it(node: PlayedNode, leave: str) -> None:
    with Client.connect(node.path) as client:
        stream = client.stream(HALF, max_tokens=100)
        if leave == "with":
            with stream:
                next(stream)
        else:
            for _ in stream:
                break
        if leave == "close":
            stream.close()
            assert list(stream) == []
        del stream
        gc.collect()
        eventually(lambda: client.status()["requests"]["in_flight"] == 0)
        assert client.status()["requests"]["cancelled"] == 1
        assert client.generate("abc", max_tokens=3).text == "abc"


def test_cancel_lets_the_last_delta_come(node: PlayedNode) -> None:
    with Client.connect(node.path) as client:
        stream = client.stream(STUCK)
        stream.cancel()
        [delta] = list(stream)
        assert delta.end is not None and delta.end.finish_reason == "cancelled"
        client.cancel(stream.id)
        result: list[Completion] = []
        waiting = threading.Thread(target=lambda: result.append(client.generate(STUCK)))
        waiting.start()
        eventually(lambda: client.status()["requests"]["in_flight"] == 1)
        client.cancel(max(client._replies._requests))
        waiting.join(WAIT_S)
        assert result[0].finish_reason == "cancelled"


def test_a_wait_has_the_end_that_the_caller_gives(node: PlayedNode) -> None:
    with Client.connect(node.path) as client:
        with pytest.raises(TimedOut):
            client.generate(STUCK, timeout_s=0.02)
        with pytest.raises(TimedOut):
            list(client.stream(STUCK, timeout_s=0.02))
        eventually(lambda: client.status()["requests"]["in_flight"] == 0)


def test_errors_have_types_and_name_the_parameter(node: PlayedNode) -> None:
    with Client.connect(node.path) as client:
        with pytest.raises(TooLong, match="502"):
            client.generate([1, 2], max_tokens=500)
        with pytest.raises(InvalidRequest, match="0 to 999") as error:
            client.generate([1000])
        assert error.value.param == "prompt_ids" and not error.value.retry
        with pytest.raises(InvalidRequest) as error:
            client.generate("")
        assert error.value.param == "prompt"
        with pytest.raises(TooLarge, match="less text"):
            client.generate("x" * (9 << 20))
        assert client.generate("abc", max_tokens=1).token_ids == encode("a")


@pytest.mark.parametrize(
    ("keywords", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 2.0}, "top_p"),
        ({"max_tokens": "many"}, None),
        ({"stop": [""]}, "stop"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_bad_parameters_are_refused_before_anything_is_sent(
    node: PlayedNode, keywords: dict[str, object], param: str | None
) -> None:
    with Client.connect(node.path) as client:
        with pytest.raises(InvalidRequest) as error:
            client.generate("abc", **keywords)  # type: ignore[arg-type]
        assert error.value.param == param
        with pytest.raises(TypeError, match="beam_width"):
            client.generate("abc", beam_width=3)  # type: ignore[call-arg]
        with pytest.raises(TypeError):
            client.generate(b"abc")
        with pytest.raises(InvalidRequest, match="role and content"):
            client.chat([{"content": "x"}])
        assert client.status()["requests"]["failed"] == 0


def test_a_node_that_stops_answers_what_is_in_flight(node: PlayedNode) -> None:
    client = Client.connect(node.path)
    stream = client.stream(STUCK)
    assert client.models()
    node.stop()
    with pytest.raises(Unavailable) as error:
        list(stream)
    assert error.value.retry
    eventually(lambda: client._link._writer is None)
    with pytest.raises(NodeNotRunning, match="albireo node start"):
        client.generate("abc")
    client.close()
    with pytest.raises(NodeNotRunning, match="albireo node start"):
        Client.connect(node.path)


def test_closing_ends_what_is_in_flight(node: PlayedNode) -> None:
    client = Client.connect(node.path)
    stream = client.stream(STUCK)
    threading.Timer(0.02, client.close).start()
    with pytest.raises(ConnectionLost, match="closed by this client"):
        list(stream)
    with pytest.raises(ConnectionLost):
        client.status()
    client.close()


def test_each_waiter_has_an_error_of_its_own(node: PlayedNode) -> None:
    """One that is raised in several threads would gather the tracebacks of all."""
    client = Client.connect(node.path)
    asked = [lambda: client.generate(STUCK)] * 4 + [lambda: list(client.stream(STUCK))] * 4
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(each) for each in asked]
        eventually(lambda: client.status()["requests"]["in_flight"] == 8)
        client.close()
        errors = [each.exception(WAIT_S) for each in waiting]
    for ask in asked:
        with pytest.raises(ConnectionLost) as error:
            ask()
        errors.append(error.value)
    assert {(type(each), str(each)) for each in errors} == {
        (ConnectionLost, "the connection was closed by this client")
    }
    assert len({id(each) for each in errors}) == 16


def test_a_forgotten_client_closes_its_connection(node: PlayedNode) -> None:
    with Client.connect(node.path) as watcher:
        forgotten = Client.connect(node.path)
        assert watcher.status()["connections"] == 2
        del forgotten
        gc.collect()
        eventually(lambda: watcher.status()["connections"] == 1)


def test_no_node_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALBIREO_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(NodeNotRunning, match="no node named 'work' is running") as error:
        Client.connect(node="work")
    assert "--name work" in str(error.value) and str(tmp_path) in str(error.value)
    with pytest.raises(InvalidRequest, match="cannot name a node"):
        Client.connect(node="../x")
    (tmp_path / "api.sock").touch()
    with pytest.raises(NodeNotRunning, match="nobody listens there"):
        Client.connect(str(tmp_path / "api.sock"))


def test_a_router_that_dies_under_a_hello(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor(1) as pool:
        listener.bind(str(path))
        listener.listen()
        client = pool.submit(Client.connect, str(path))
        connection, _ = listener.accept()
        with connection:
            select.select([connection], [], [], WAIT_S)  # What is not read then resets it.
        with pytest.raises(NodeNotRunning, match=r"ended while .* try once more") as error:
            client.result(5)
        assert error.value.retry


def test_eos_is_not_what_the_fakes_generate() -> None:
    assert EOS not in encode("any text")


def test_several_answers(node: PlayedNode) -> None:
    with Client.connect(node.path) as client:
        answer = client.generate("abc", max_tokens=5, n=3)
        assert [each.text for each in answer.choices] == ["abcab"] * 3
        assert answer.text == "abcab"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 15)
        with client.stream("ab", max_tokens=4, n=2) as stream:
            deltas = list(stream)
        assert sorted(each.choice for each in deltas if each.end is not None) == [0, 1]
        for choice in (0, 1):
            assert "".join(each.text for each in deltas if each.choice == choice) == "abab"
