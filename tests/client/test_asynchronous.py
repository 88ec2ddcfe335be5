"""AsyncClient, the library's face for asyncio."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from albireo.client import (
    AlbireoError,
    AsyncClient,
    ConnectionLost,
    Delta,
    InvalidRequest,
    NodeNotRunning,
    TooLong,
    Unavailable,
)

from ..router.fakes import WAIT_S, encode
from .conftest import PlayedNode

STUCK = [999, 1]
HALF = [998, 1]
Scenario = Callable[[AsyncClient], Awaitable[None]]


def run(path: str, scenario: Scenario, uv: bool = False) -> None:
    """Runs a coroutine with a connected client, with a limit."""

    async def connected() -> None:
        async with asyncio.timeout(4 * WAIT_S), await AsyncClient.connect(path) as client:
            await scenario(client)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if uv else None) as runner:
        runner.run(connected())


async def until_idle(client: AsyncClient) -> None:
    while (await client.status())["requests"]["in_flight"]:
        await asyncio.sleep(0.002)


@pytest.mark.parametrize("uv", [False, True])
def test_all_services(node: PlayedNode, uv: bool) -> None:
    async def scenario(client: AsyncClient) -> None:
        answer = await client.generate("abc", max_tokens=7)
        assert (answer.text, answer.finish_reason) == ("abcabca", "length")
        assert answer.token_ids == encode("abcabca") and answer.usage.prompt_tokens == 3
        deltas = [delta async for delta in client.stream(encode("abc"), max_tokens=4)]
        assert "".join(delta.text for delta in deltas) == "abca"
        assert [delta.index for delta in deltas] == [0, 1, 2, 3]
        messages = [{"role": "user", "content": "hello"}]
        assert (await client.chat(messages, max_tokens=5)).text == "hello"
        stream = await client.chat(messages, stream=True, max_tokens=2)
        assert "".join([delta.text async for delta in stream]) == "he"
        assert await client.tokenize("abc") == encode("abc")
        assert await client.tokenize(messages) == encode("hello")
        assert await client.detokenize(encode("abc")) == "abc"
        assert [card.id for card in await client.models()] == ["fake-model"]
        assert (await client.status())["model"]["id"] == "fake-model"

    run(node.path, scenario, uv)


def test_many_in_flight_on_one_connection(node: PlayedNode) -> None:
    async def scenario(client: AsyncClient) -> None:
        texts = [f"text number {number}" for number in range(150)]
        answers = await asyncio.gather(
            *(client.generate(text, max_tokens=len(text)) for text in texts)
        )
        assert [answer.text for answer in answers] == texts

    run(node.path, scenario)


def test_callbacks(node: PlayedNode) -> None:
    async def scenario(client: AsyncClient) -> None:
        replies: list[Delta | AlbireoError] = []
        done = asyncio.Event()

        def take(reply: Delta | AlbireoError) -> None:
            replies.append(reply)
            if isinstance(reply, AlbireoError) or reply.end is not None:
                done.set()

        client.submit("abc", take, max_tokens=3)
        await done.wait()
        assert [reply.text for reply in replies if isinstance(reply, Delta)] == ["a", "b", "c"]
        done.clear()
        client.submit([1000], take)
        await done.wait()
        assert isinstance(replies[-1], InvalidRequest)

    run(node.path, scenario)


def test_an_abandoned_stream_is_cancelled(node: PlayedNode) -> None:
    async def scenario(client: AsyncClient) -> None:
        async for _ in client.stream(HALF, max_tokens=100):
            break
        gc.collect()
        await until_idle(client)
        async with client.stream(HALF, max_tokens=100) as stream:
            await anext(stream)
        assert [delta async for delta in stream] == []
        await until_idle(client)
        dropped = client.stream(STUCK)
        del dropped
        gc.collect()
        await until_idle(client)
        assert (await client.status())["requests"]["cancelled"] == 3

    run(node.path, scenario)


def test_a_cancelled_task_cancels_its_request(node: PlayedNode) -> None:
    async def scenario(client: AsyncClient) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await client.generate(STUCK)
        await until_idle(client)
        stream = client.stream(STUCK)
        stream.cancel()
        [delta] = [delta async for delta in stream]
        assert delta.end is not None and delta.end.finish_reason == "cancelled"

    run(node.path, scenario)


def test_errors_are_raised_where_the_answer_is_awaited(node: PlayedNode) -> None:
    async def scenario(client: AsyncClient) -> None:
        with pytest.raises(TooLong, match="502"):
            await client.generate([1, 2], max_tokens=500)
        with pytest.raises(TooLong):
            async for _ in client.stream([1, 2], max_tokens=500):
                pass
        with pytest.raises(InvalidRequest):
            await client.detokenize([1000])

    run(node.path, scenario)


def test_the_end_of_the_connection_reaches_everybody(node: PlayedNode) -> None:
    async def scenario(client: AsyncClient) -> None:
        waiting = asyncio.create_task(client.generate(STUCK))
        await client.models()
        await asyncio.to_thread(node.stop)
        with pytest.raises(Unavailable):
            await waiting
        with pytest.raises(NodeNotRunning, match="albireo node start"):
            await client.generate("abc")

    run(node.path, scenario)

    async def connect() -> None:
        with pytest.raises(NodeNotRunning, match="albireo node start"):
            await AsyncClient.connect(node.path)

    asyncio.run(connect())


def test_closing_ends_what_is_in_flight(node: PlayedNode) -> None:
    async def scenario(client: AsyncClient) -> None:
        stream = client.stream(STUCK)
        await client.close()
        with pytest.raises(ConnectionLost):
            await anext(stream)
        with pytest.raises(ConnectionLost):
            client.stream("abc")

    run(node.path, scenario)


def test_the_node_s_name_finds_its_socket(
    node: PlayedNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALBIREO_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "work").symlink_to(Path(node.path).parent)

    async def connect() -> None:
        async with await AsyncClient.connect(node="work") as client:
            assert client.welcome.node == "test"

    asyncio.run(connect())


def test_several_answers(node: PlayedNode) -> None:
    async def main() -> None:
        async with await AsyncClient.connect(node.path) as client:
            answer = await client.generate("abc", max_tokens=5, n=3)
            assert [each.text for each in answer.choices] == ["abcab"] * 3
            ends = [
                delta.choice
                async for delta in client.stream("ab", max_tokens=4, n=2)
                if delta.end is not None
            ]
            assert sorted(ends) == [0, 1]

    asyncio.run(main())
