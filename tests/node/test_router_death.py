"""kill -9 of the router in mid-stream: with a journal a pause, without one a clear error."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from albireo.client import AlbireoError, AsyncClient, Client, ConnectionLost
from albireo.client.reconnect import RECONNECT_S
from albireo.client.requests import generate_message, resolve_params
from albireo.ipc.simulated import sim_token
from albireo.node.options import NodeOptions, OptionError

from .processes import alive, pids, status, wait_for, whole

pytestmark = pytest.mark.node

STREAMS = 6
TOKENS = 150
PROMPT = [5, 6, 7]


def formula(seed: int, tokens: int, vocab: int = 264) -> list[int]:
    """What the sim device says to PROMPT."""
    return [sim_token(seed, len(PROMPT) + place, vocab) for place in range(tokens)]


class Streams:
    """Streams of three clients: a blocking one, an asynchronous one, and one that reads slowly."""

    def __init__(self, node: str, **params: Any) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(STREAMS)]
        self.texts = [""] * STREAMS
        self.ends = [0] * STREAMS
        self.errors: dict[int, AlbireoError] = {}
        self.times: list[list[float]] = [[] for _ in range(STREAMS)]
        self._node = node
        self._params = {"max_tokens": TOKENS, "ignore_eos": True, **params}
        self.go_on = threading.Event()
        self._threads = [
            threading.Thread(target=target, daemon=True)
            for target in (self._blocking, self._asynchronous, self._slow)
        ]
        for thread in self._threads:
            thread.start()

    def _take(self, number: int, delta: Any) -> None:
        assert delta.index == len(self.tokens[number])
        self.tokens[number] += delta.token_ids
        self.texts[number] += delta.text
        self.ends[number] += delta.end is not None
        self.times[number].append(time.monotonic())

    def _read(self, client: Client, number: int) -> None:
        try:
            for delta in client.stream(PROMPT, seed=number, **self._params):
                self._take(number, delta)
        except AlbireoError as error:
            self.errors[number] = error

    def _blocking(self) -> None:
        with Client.connect(node=self._node) as client:
            threads = [threading.Thread(target=self._read, args=(client, n)) for n in (0, 1)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def _asynchronous(self) -> None:
        async def read(client: AsyncClient, number: int) -> None:
            try:
                async for delta in client.stream(PROMPT, seed=number, **self._params):
                    self._take(number, delta)
            except AlbireoError as error:
                self.errors[number] = error

        async def run() -> None:
            async with await AsyncClient.connect(node=self._node) as client:
                await asyncio.gather(*(read(client, number) for number in (2, 3)))

        asyncio.run(run())

    def _slow(self) -> None:
        """Its handler holds the reader's thread up: the router merges what waits."""
        done = threading.Semaphore(0)

        def take(number: int, reply: Any) -> None:
            if isinstance(reply, AlbireoError):
                self.errors[number] = reply
                done.release()
                return
            self._take(number, reply)
            if len(self.tokens[number]) == 5:
                self.go_on.wait(20)
            if reply.end is not None:
                done.release()

        with Client.connect(node=self._node) as client:
            for number in (4, 5):
                params = resolve_params(None, {"seed": number, **self._params})
                client.request(
                    lambda given, params=params: generate_message(given, PROMPT, params),
                    lambda reply, number=number: take(number, reply),
                )
            for _ in range(2):
                done.acquire()

    def wait_for_tokens(self, count: int) -> None:
        """Of the slow client, whose handler may be holding its other stream up, one will do."""
        wait_for("the streams run", lambda: all(len(e) >= count for e in self.tokens[:4]), 20)
        wait_for("the slow ones, too", lambda: any(self.tokens[4:]), 20)

    def join(self) -> None:
        self.go_on.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_for("the router is gone", lambda: not alive(pid), 5)


@pytest.fixture
def start(
    start_node: Callable[..., str], tiny_model_dir: Path, tmp_path: Path
) -> Iterator[Callable[..., str]]:
    def start_one(**changes: Any) -> str:
        fields = {
            "name": "rd", "model": str(tiny_model_dir), "load_format": "dummy", "device": "sim",
            "groups": (1, 1), "sim_step_ms": 10.0, "journal": str(tmp_path / "journal"),
        }  # fmt: skip
        return start_node(**(fields | changes))

    yield start_one


def test_streams_go_on_token_for_token_over_two_deaths(
    start: Callable[..., str], tmp_path: Path
) -> None:
    node = start()
    streams = Streams(node)
    router = 0
    for count in (10, 60):
        router = next_router(node, router)
        streams.wait_for_tokens(count)
        kill(router)
    streams.join()
    assert streams.errors == {}
    assert streams.tokens == [formula(number, TOKENS) for number in range(STREAMS)]
    assert streams.ends == [1] * STREAMS
    counts = status(node)["requests"]
    assert counts["failed"] == 0 and counts["resumed"] >= STREAMS - 2
    assert counts["waiting_for_client"] == counts["in_flight"] == 0
    wait_for("the node is whole", lambda: whole(node), 3)


def test_without_a_journal_streams_end_and_the_rest_is_asked_again(
    start: Callable[..., str],
) -> None:
    node = start(journal=None, max_num_seqs=2, groups=(1,), sim_step_ms=20.0)
    answers: list[Any] = []

    def ask(client: Client) -> None:
        answers.append(client.generate(PROMPT, seed=9, max_tokens=20, ignore_eos=True))

    with Client.connect(node=node) as client:
        streams = [client.stream(PROMPT, seed=n, max_tokens=300, ignore_eos=True) for n in (0, 1)]
        began = [next(each) for each in streams]
        waiting = client.stream(PROMPT, seed=2, max_tokens=20, ignore_eos=True)
        whole_answer = threading.Thread(target=ask, args=(client,))
        whole_answer.start()
        wait_for("all are there", lambda: status(node)["requests"]["in_flight"] == 4, 5)
        kill(pids(node)["router"])
        at = time.monotonic()
        for stream in streams:
            with pytest.raises(ConnectionLost, match="ask again") as error:
                list(stream)
            assert error.value.retry
        assert time.monotonic() - at < RECONNECT_S / 2 and all(began)
        tokens = list(itertools.chain.from_iterable(delta.token_ids for delta in waiting))
        assert tokens == formula(2, 20)
        whole_answer.join(20)
        assert answers[0].token_ids == formula(9, 20)


def test_a_model_goes_on_token_for_token(start: Callable[..., str]) -> None:
    """With penalties, stop strings, a temperature and log-probabilities."""
    node = start(device="cpu", dtype="float32", threads=1, batch_invariant=True)
    params = {
        "max_tokens": 240, "ignore_eos": True, "temperature": 0.9, "top_p": 0.95, "top_k": 40,
        "repetition_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": 0.3,
        "min_tokens": 230, "stop": ["zq"], "logprobs": 1, "logit_bias": {9: 1.5},
    }  # fmt: skip
    undisturbed = Streams(node, **params)
    undisturbed.join()
    for _ in range(5):  # All may have ended before the kill, where this process had no core.
        router = pids(node)["router"]
        streams = Streams(node, **params)
        streams.wait_for_tokens(10)
        kill(router)
        streams.join()
        assert streams.errors == undisturbed.errors == {}
        assert streams.tokens == undisturbed.tokens
        assert streams.texts == undisturbed.texts
        wait_for("the node is whole again", lambda: whole(node), 10)
        if status(node)["requests"]["resumed"]:
            break
    assert status(node)["requests"]["resumed"] > 0, "all had ended before the kill, each time"


def test_death_while_clients_reconnect(start: Callable[..., str]) -> None:
    node = start()
    router = pids(node)["router"]
    streams = Streams(node)
    streams.wait_for_tokens(10)
    for _ in range(3):
        kill(router)
        router = next_router(node, router)
    streams.join()
    assert streams.errors == {}
    assert streams.tokens == [formula(number, TOKENS) for number in range(STREAMS)]


def next_router(node: str, before: int) -> int:
    """Its pid, as soon as it says who it is."""
    while True:
        with contextlib.suppress(AlbireoError):
            pid = pids(node).get("router", before)
            if pid != before:
                return pid


def test_the_whole_node_dies_and_comes_back(start: Callable[..., str]) -> None:
    node = start()
    streams = Streams(node)
    streams.wait_for_tokens(10)
    before = pids(node)
    os.kill(before["supervisor"], signal.SIGKILL)
    wait_for("it is gone", lambda: not any(alive(pid) for pid in before.values()), 10)
    assert start() == node
    streams.join()
    assert streams.errors == {}
    assert streams.tokens == [formula(number, TOKENS) for number in range(STREAMS)]


class Events:
    """Streams over HTTP, as a client sees them."""

    def __init__(self, socket: str, then: Callable[[], Any]) -> None:
        self.found: list[list[dict[str, Any]]] = [[] for _ in range(3)]
        self.statuses: set[int] = set()
        self._socket = socket
        self._began = threading.Barrier(4)
        threads = [threading.Thread(target=self._read, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        self._began.wait(20)
        then()
        for thread in threads:
            thread.join(40)
            assert not thread.is_alive()

    def _read(self, number: int) -> None:
        body = {
            "prompt": PROMPT, "stream": True, "max_tokens": TOKENS, "ignore_eos": True,
            "seed": number, "stream_options": {"include_usage": True},
        }  # fmt: skip
        transport = httpx2.HTTPTransport(uds=self._socket)
        with (
            httpx2.Client(transport=transport, base_url="http://x", timeout=30) as client,
            client.stream("POST", "/v1/completions", json=body) as answer,
        ):
            self.statuses.add(answer.status_code)
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    self.found[number].append(json.loads(line[6:]))
                    if len(self.found[number]) == 5:
                        self._began.wait(20)

    def texts(self) -> list[str]:
        return ["".join(c["text"] for e in each for c in e["choices"]) for each in self.found]


def test_http_streams_go_on(start: Callable[..., str], tmp_path: Path) -> None:
    socket = str(tmp_path / "http")
    node = start(uds=socket)
    undisturbed = Events(socket, lambda: None)
    disturbed = Events(socket, functools.partial(kill, pids(node)["router"]))
    assert disturbed.statuses == undisturbed.statuses == {200}
    assert disturbed.texts() == undisturbed.texts()
    for each in disturbed.found:
        assert each[-1]["usage"]["completion_tokens"] == TOKENS
        assert each[-2]["choices"][0]["finish_reason"] == "length"
    assert status(node)["requests"]["resumed"] == 3


def test_http_streams_without_a_journal_end_with_an_error(
    start: Callable[..., str], tmp_path: Path
) -> None:
    socket = str(tmp_path / "http")
    node = start(uds=socket, journal=None)
    whole: list[Any] = []

    def ask() -> None:
        transport = httpx2.HTTPTransport(uds=socket)
        body = {"prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "n": 2}
        with httpx2.Client(transport=transport, base_url="http://x", timeout=30) as client:
            whole.append(client.post("/v1/completions", json=body).json())

    asking = threading.Thread(target=ask)
    asking.start()
    found = Events(socket, functools.partial(kill, pids(node)["router"])).found
    asking.join(40)
    assert whole[0]["usage"]["completion_tokens"] == 400, "a whole answer is asked again"
    for each in found:
        assert each[-1]["error"]["code"] == "unavailable"
        assert "ask again" in each[-1]["error"]["message"]


def test_who_leaves_is_cancelled_at_once(start: Callable[..., str], tmp_path: Path) -> None:
    """An HTTP client's requests do not wait for it, whatever the gateway's do."""
    socket = str(tmp_path / "http")
    node = start(uds=socket)
    transport = httpx2.HTTPTransport(uds=socket)
    body = {"prompt": PROMPT, "stream": True, "max_tokens": 490, "ignore_eos": True}
    with (
        httpx2.Client(transport=transport, base_url="http://x", timeout=30) as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        next(answer.iter_lines())
    wait_for("it is over", lambda: status(node)["requests"]["in_flight"] == 0, 20)
    counts = status(node)["requests"]
    assert (counts["cancelled"], counts["waiting_for_client"]) == (1, 0)


def test_a_journal_that_cannot_be(start: Callable[..., str]) -> None:
    with pytest.raises(AssertionError, match="--journal /proc/none cannot be used"):
        start(journal="/proc/none")
    with pytest.raises(OptionError, match="--resume-grace 0"):
        NodeOptions(journal="j", resume_grace_s=0.0).check()
