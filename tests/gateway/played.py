"""A node as the gateway's link sees it, played by the tests: no router, no process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import msgspec

from albireo.client import AlbireoError, Delta, End, InternalError, InvalidRequest, Welcome
from albireo.gateway.app import make_app
from albireo.gateway.link import Ask
from albireo.ipc.keys import ApiKeys
from albireo.ipc.protocol import Logprobs, TokenLogprob
from albireo.ipc.template import PLAIN, TemplateOptions
from albireo.live.watch import AsyncWatch

from ..live import trees

MODEL = "played"
Script = Callable[["PlayedLink", int, Ask, Callable[[Any], None]], Awaitable[None]]


def token(text: str | bytes, logprob: float = -0.5, rank: int = 1, number: int = 0) -> TokenLogprob:
    raw = text.encode() if isinstance(text, str) else text
    return TokenLogprob(number or sum(raw), logprob, rank, raw)


def row(text: str | bytes, *top: str | bytes) -> Logprobs:
    best = [token(each, -0.1 * (place + 1), place + 1) for place, each in enumerate(top)]
    return Logprobs(token(text), best)


def words(ask: Ask) -> list[str]:
    """What the played model says to a prompt: its own words, numbered."""
    said = ask.prompt if ask.messages is None else ask.messages[-1].content
    text = said if isinstance(said, str) else "".join(chr(each) for each in said or [])
    most = ask.params.max_tokens or 4
    return [f" {text}{place}" for place in range(most)]


async def parrot(link: PlayedLink, number: int, ask: Ask, on_reply: Callable[[Any], None]) -> None:
    """Every choice says its words, one a step, each choice in upper case but the first."""
    said = words(ask)
    params = ask.params
    for place, word in enumerate(said):
        await asyncio.sleep(0)
        for choice in range(params.n):
            text = word if choice == 0 else word.upper()
            last = place == len(said) - 1
            rows = None if params.logprobs is None else [row(text, *("a", "b")[: params.logprobs])]
            prompt_rows = None
            if params.prompt_logprobs is not None and place == 0 and choice == 0:
                prompt_rows = [row("x", "y"), row("z")]
            on_reply(
                Delta(
                    number,
                    place,
                    [place],
                    text,
                    End("length", None, 3, len(said)) if last else None,
                    choice,
                    rows,
                    prompt_rows,
                    0 if place else 3,
                )
            )


def _no_message() -> AlbireoError:
    return InvalidRequest("the conversation has no message", param="messages")


class PlayedLink:
    """Instead of albireo.gateway.link.NodeLink."""

    def __init__(self, script: Script = parrot) -> None:
        self.welcome = Welcome(
            protocol=1, version="1.2.3", node="n", model=MODEL, max_model_len=100, vocab_size=1000,
            max_frame_bytes=1 << 20,
        )  # fmt: skip
        self.asks: list[Ask] = []
        self.abandoned: list[int] = []
        self.text_tenants: list[str] = []
        self.templates: list[TemplateOptions] = []
        self.tree: dict[str, Any] = status_tree()
        self.watch = AsyncWatch(self.status)
        self._script = script
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, ask: Ask, on_reply: Callable[[Any], None]) -> Callable[[], None]:
        number = len(self.asks)
        self.asks.append(ask)
        task = asyncio.ensure_future(self._play(number, ask, on_reply))
        self._tasks.add(task)

        def abandon() -> None:
            if not task.done():
                task.cancel()
                self.abandoned.append(number)

        return abandon

    async def _play(self, number: int, ask: Ask, on_reply: Callable[[Any], None]) -> None:
        """Every request has an end, as with a router: also where the script fails."""
        try:
            if ask.messages == []:
                raise _no_message()
            await self._script(self, number, ask, on_reply)
        except AlbireoError as error:
            on_reply(error)
        except Exception as error:
            on_reply(InternalError(f"the script failed: {error!r}"))

    async def tokenize(
        self, text: Any, tenant: str, *, add_special_tokens: bool = True,
        template: TemplateOptions = PLAIN,
    ) -> list[int]:  # fmt: skip
        self.text_tenants.append(tenant)
        self.templates.append(template)
        if text == []:
            raise _no_message()
        said = text if isinstance(text, str) else text[-1].content
        return [ord(each) for each in ("^" if add_special_tokens else "") + said]

    async def detokenize(self, ids: list[int], tenant: str) -> str:
        self.text_tenants.append(tenant)
        return "".join(chr(each) for each in ids)

    async def status(self) -> dict[str, Any]:
        return self.tree


def failing(error: AlbireoError, after: int = 0) -> Script:
    """A script that ends with an error behind so many tokens."""

    async def script(
        link: PlayedLink, number: int, ask: Ask, on_reply: Callable[[Any], None]
    ) -> None:
        for place in range(after):
            on_reply(Delta(number, place, [1], "x"))
            await asyncio.sleep(0.005)
        on_reply(error)

    return script


def post(
    path: str, body: Any, link: PlayedLink | None = None, keys: ApiKeys | None = None,
    headers: dict[str, str] | None = None,
) -> httpx2.Response:  # fmt: skip
    """One request straight to the application.  `body`: bytes as they are, or JSON."""
    payload = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return _ask("POST", path, payload, link, keys, headers)


def get(
    path: str, link: PlayedLink | None = None, keys: ApiKeys | None = None,
    headers: dict[str, str] | None = None,
) -> httpx2.Response:  # fmt: skip
    return _ask("GET", path, b"", link, keys, headers)


def _ask(
    method: str, path: str, payload: bytes, link: PlayedLink | None, keys: ApiKeys | None,
    headers: dict[str, str] | None,
) -> httpx2.Response:  # fmt: skip
    app = make_app(link or PlayedLink(), keys or ApiKeys(), ())  # type: ignore[arg-type]

    async def ask() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://played") as client:
            return await client.request(method, path, content=payload, headers=headers)

    return asyncio.run(ask())


def chunks(response: httpx2.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, which has to end with [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [msgspec.json.decode(each.removeprefix("data: ").encode()) for each in events[:-2]]


def status_tree() -> dict[str, Any]:
    """A status tree with one group that has reported, and one that has not."""
    model = trees.tree()["model"] | {"id": MODEL}
    return trees.tree(
        trees.group(tokens=5, stages=None),
        trees.group(1, state="restarting", scheduler=None, stages=None),
        model=model,
    )
