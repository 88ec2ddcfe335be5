"""What every endpoint that answers with tokens does: ask the node, watch the client, count."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable

from albireo.client import End

from .answers import Usage
from .batch import Batch
from .errors import HttpError, invalid
from .http import Request
from .inbox import Inbox
from .link import Ask, NodeLink

MAX_ANSWERS = 2048
"""Choices of one HTTP request: prompts times n."""


@contextlib.asynccontextmanager
async def asked(
    request: Request, link: NodeLink, asks: list[Ask], stream: bool
) -> AsyncIterator[Inbox]:
    """Starts the requests; what has not ended when the block is left is cancelled.

    stream: answers are taken piece by piece.

    The inbox hears of it when the client leaves.  Raises HttpError, AlbireoError.
    """
    n = asks[0].params.n
    if len(asks) * n > MAX_ANSWERS:
        raise invalid(
            f"{len(asks)} prompts with n = {n} make {len(asks) * n} answers; at most "
            f"{MAX_ANSWERS} are given at once",
            "n" if n > 1 else "prompt",
        )
    inbox = Inbox(len(asks), n)
    watch = asyncio.ensure_future(request.gone())
    watch.add_done_callback(lambda _: inbox.leave())
    batch = Batch(link, asks, inbox, stream)
    try:
        batch.start()
        yield inbox
    finally:
        watch.cancel()
        batch.end()


def check_model(link: NodeLink, model: str | None) -> None:
    """Raises HttpError (404) for a model that is not served here; none named is the served one."""
    served = link.welcome.model
    if model is not None and model != served:
        raise HttpError(
            404,
            f"the model {model[:128]!r} is not served here; {served!r} is",
            param="model",
            code="model_not_found",
        )


def usage_of(ends: Iterable[tuple[int, End]], n: int) -> Usage:
    """Of the ends of all choices, by number."""
    prompt = completion = 0
    for choice, end in ends:
        completion += end.completion_tokens
        if choice % n == 0:
            prompt += end.prompt_tokens
    return Usage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
    )
