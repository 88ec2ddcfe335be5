"""Batches of more prompts than the node has room for at once."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from albireo.client import AlbireoError, QueueFull, TooLong
from albireo.gateway.link import Ask
from albireo.node.launch import stop_node

from .conftest import start_http_node
from .played import PlayedLink, chunks, parrot, post
from .serving import Bare, Serving, wait_for

PATH = "/v1/completions"


class Crowded:
    """A script: parrot, for `room` answers at once, of which others have `taken`.

    most: answers that were in flight together.  refused: requests.
    """

    def __init__(self, room: int, taken: int = 0) -> None:
        self.room = room
        self.taken = taken
        self.most = 0
        self.refused = 0

    async def __call__(self, link: PlayedLink, number: int, ask: Ask, on_reply: Any) -> None:
        n = ask.params.n
        if self.taken + n > self.room:
            self.refused += 1
            raise QueueFull("full", retry=True)
        self.taken += n
        self.most = max(self.most, self.taken)
        try:
            await self.answer(link, number, ask, on_reply)
        finally:
            self.taken -= n

    async def answer(self, link: PlayedLink, number: int, ask: Ask, on_reply: Any) -> None:
        await parrot(link, number, ask, on_reply)


def _said(prompts: int, n: int, tokens: int) -> dict[int, str]:
    """The texts of all choices to the prompts p0., p1. and so on."""
    said = {}
    for choice in range(prompts * n):
        text = "".join(f" p{choice // n}.{place}" for place in range(tokens))
        said[choice] = text.upper() if choice % n else text
    return said


@pytest.mark.parametrize("room", [2, 5, 12])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_a_batch_larger_than_the_node_is_answered_whole(stream: bool, n: int, room: int) -> None:
    script = Crowded(room)
    body = {"prompt": [f"p{i}." for i in range(40)], "n": n, "max_tokens": 3, "stream": stream}
    answer = post(PATH, body, PlayedLink(script))
    said: dict[int, str] = {}
    for each in chunks(answer) if stream else [answer.json()]:
        for choice in each["choices"]:
            said[choice["index"]] = said.get(choice["index"], "") + choice["text"]
    assert said == _said(40, n, 3)
    assert stream or answer.json()["usage"]["completion_tokens"] == 40 * n * 3
    assert script.most == room // n * n
    assert script.refused < 2 * 40


@pytest.mark.parametrize("stream", [False, True])
def test_a_batch_that_finds_no_room_at_all_is_refused(stream: bool) -> None:
    link = PlayedLink(Crowded(8, taken=8))
    answer = post(PATH, {"prompt": ["a"] * 5, "stream": stream}, link)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert len(link.asks) == 5


def test_room_that_others_leave_is_found() -> None:
    class Others(Crowded):
        """They leave as the first answer of the batch has ended."""

        async def answer(self, link: PlayedLink, number: int, ask: Ask, on_reply: Any) -> None:
            await asyncio.sleep(0)
            if number == 0:
                self.taken = 1
            await parrot(link, number, ask, on_reply)

    script = Others(8, taken=7)
    assert post(PATH, {"prompt": ["a"] * 40, "max_tokens": 1}, PlayedLink(script)).is_success
    assert script.most == 8


def test_others_that_take_the_room_in_mid_batch_end_it() -> None:
    class Others(Crowded):
        """They take the room of every answer that ends."""

        async def answer(self, link: PlayedLink, number: int, ask: Ask, on_reply: Any) -> None:
            await parrot(link, number, ask, on_reply)
            self.taken += 1

    answer = post(PATH, {"prompt": ["a"] * 8, "max_tokens": 1}, PlayedLink(Others(4)))
    assert answer.status_code == 503


@pytest.mark.parametrize("fails_at", [0, 5, 39])
@pytest.mark.parametrize("error", [TooLong("too long"), QueueFull("full", retry=True)])
def test_a_prompt_that_cannot_be_answered_ends_the_batch(error: Any, fails_at: int) -> None:
    """Also one that is refused for ever, as nothing else of the batch is left."""

    class Faulty(Crowded):
        async def answer(self, link: PlayedLink, number: int, ask: Ask, on_reply: Any) -> None:
            if ask.prompt == str(fails_at):
                raise error
            await parrot(link, number, ask, on_reply)

    body = {"prompt": [str(i) for i in range(40)], "max_tokens": 2}
    answer = post(PATH, body, PlayedLink(Faulty(4)))
    assert answer.status_code == (503 if isinstance(error, QueueFull) else 400)


def test_the_node_cannot_be_asked_again() -> None:
    class Broken(PlayedLink):
        def submit(self, ask: Ask, on_reply: Any) -> Any:
            if len(self.asks) == 8:
                raise AlbireoError("the client is closed")
            return super().submit(ask, on_reply)

    answer = post(PATH, {"prompt": ["a"] * 8, "max_tokens": 2}, Broken(Crowded(4)))
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "the client is closed")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_what_runs_and_nothing_more_is_asked(
    tmp_path: Path, stream: bool
) -> None:
    class Endless(Crowded):
        async def answer(self, link: PlayedLink, number: int, ask: Ask, on_reply: Any) -> None:
            await asyncio.sleep(60)

    script = Endless(4)
    serving = Serving(PlayedLink(script), tmp_path / "s")
    try:
        bare = Bare(serving)
        bare.post(PATH, json.dumps({"prompt": ["a"] * 10, "stream": stream}).encode())
        wait_for(lambda: script.refused == 6)
        bare.close()
        wait_for(lambda: script.taken == 0)
        assert serving.link.abandoned == [0, 1, 2, 3] and len(serving.link.asks) == 10
    finally:
        serving.stop()


@pytest.mark.node
def test_a_batch_larger_than_a_real_node(module_home: Path, tiny_model_dir: Path) -> None:
    node = start_http_node(
        module_home, name="narrow", device="sim", sim_step_ms=1.0, model=str(tiny_model_dir),
        served_model_name="tiny", max_num_seqs=8, max_num_queued_reqs=4,
    )  # fmt: skip
    try:
        url = f"{node.http}{PATH}"
        body = {"prompt": ["a"] * 40, "n": 2, "max_tokens": 3, "ignore_eos": True}
        whole = httpx2.post(url, json=body).json()
        assert [each["index"] for each in whole["choices"]] == list(range(80))
        assert whole["usage"]["completion_tokens"] == 80 * 3
        events = chunks(httpx2.post(url, json={**body, "stream": True}))
        assert {each["choices"][0]["index"] for each in events} == set(range(80))
        assert httpx2.post(url, json={**body, "n": 40}).status_code == 400
    finally:
        stop_node(node.name, now=True, timeout_s=20)
