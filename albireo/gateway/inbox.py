"""What has come for one HTTP request and is not written yet, merged choice by choice.

The link's callback puts Deltas in, the request's task takes them out when the
client's connection has room; `direct` may take a Delta without waking the task.
A slow reader thus finds one long piece for each choice instead of many short
ones, and what is held is bounded by the text.

A choice is prompt * n + i: request number `prompt`, its i-th answer.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Protocol

from albireo.client import AlbireoError, Delta, InternalError, QueueFull
from albireo.ipc.protocol import End, Logprobs

from .http import ClientGone

_MERGED_TEXTS = 64


class Merged:
    """Several Deltas of one choice as one; the fields that a Delta has.

    tokens: of the choice, up to the last of them.
    """

    __slots__ = ("_texts", "end", "logprobs", "prompt_logprobs", "prompt_tokens", "tokens")

    def __init__(self, first: Delta) -> None:
        self._texts = [first.text]
        self.end: End | None = first.end
        self.logprobs: list[Logprobs] | None = None if first.logprobs is None else first.logprobs[:]
        self.prompt_logprobs = first.prompt_logprobs
        self.prompt_tokens = first.prompt_tokens
        self.tokens = tokens_so_far(first)

    def add(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        if len(self._texts) == _MERGED_TEXTS:
            # Many small strings take far more memory than their characters.
            self._texts = ["".join(self._texts)]
        self.end = delta.end
        self.tokens = tokens_so_far(delta)
        if delta.logprobs:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs += delta.logprobs
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = (self.prompt_logprobs or []) + delta.prompt_logprobs

    @property
    def text(self) -> str:
        return "".join(self._texts)


Piece = Delta | Merged


def tokens_so_far(piece: Piece) -> int:
    """Of its choice, its own included."""
    return piece.tokens if isinstance(piece, Merged) else piece.index + len(piece.token_ids)


class Waiting(Protocol):
    """Prompts of the request that wait for room at the node."""

    def hold(self, prompt: int) -> bool:
        """Whether one that was refused for lack of room waits now."""

    def choice_ended(self) -> None: ...


class Inbox:
    """Replies to the `prompts` requests, of n answers each, behind one HTTP request.

    choices: of all requests, ended ones too.
    batch: is told of ends and refusals.
    interval: so many tokens of a choice are waited for, once its first have come.
    """

    __slots__ = (
        "_due", "_gone", "_held", "_n", "_waiter", "batch", "choices", "direct", "error",
        "interval", "open", "pending",
    )  # fmt: skip

    def __init__(self, prompts: int, n: int) -> None:
        self.pending: dict[int, Piece] = {}
        self.choices = prompts * n
        self.open = self.choices
        """Choices whose end is still to come."""
        self.error: AlbireoError | None = None
        self.batch: Waiting | None = None
        self.direct: Callable[[Delta], bool] | None = None
        """For an inbox of one choice: takes a Delta at once, or says that it cannot."""
        self.interval = 1
        self._n = n
        self._due = False  # something of what is pending is to be written
        self._held: dict[int, int] = {}
        self._gone = False
        self._waiter: asyncio.Future[None] | None = None

    def put(self, prompt: int, reply: object) -> None:
        """A reply to request number `prompt`."""
        if isinstance(reply, Delta):
            if (
                self.direct is not None
                and self._waiter is not None  # the task has written all that it took
                and not self.pending
                and reply.end is None
                and self.direct(reply)
            ):
                return
            choice = prompt * self._n + reply.choice
            held = self.pending.get(choice)
            if held is None:
                self.pending[choice] = reply
            else:
                if not isinstance(held, Merged):
                    held = self.pending[choice] = Merged(held)
                held.add(reply)
            if reply.end is not None:
                self.open -= 1
                if self.batch is not None:
                    self.batch.choice_ended()
            elif self.interval > 1 and reply.token_ids and self._holds(choice, reply):
                return
        elif self.batch is not None and isinstance(reply, QueueFull) and self.batch.hold(prompt):
            return
        elif self.error is None:
            self.error = (
                reply
                if isinstance(reply, AlbireoError)
                else InternalError(f"the node answered with an unexpected {type(reply).__name__}")
            )
        self._wake()

    def forget(self, prompt: int) -> None:
        """Request number `prompt` begins again.  Nothing of it must have been taken."""
        for choice in range(prompt * self._n, (prompt + 1) * self._n):
            held = self.pending.pop(choice, None)
            if held is not None and held.end is not None:
                self.open += 1

    def _holds(self, choice: int, delta: Delta) -> bool:
        """Whether a choice that has these tokens more is still to wait."""
        tokens = len(delta.token_ids)
        held = self._held.get(choice)
        if held is None or held + tokens >= self.interval:
            self._held[choice] = 0
            return False
        self._held[choice] = held + tokens
        return True

    def leave(self) -> None:
        """The client has gone."""
        self._gone = True
        self._wake()

    async def wait(self) -> None:
        """Returns when there is something new.  Raises ClientGone."""
        while not self._due and self.error is None and not self._gone:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._gone:
            raise ClientGone

    async def wait_for_more(self) -> None:
        """The same, but what is pending does not count."""
        if self.error is None and not self._gone:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._gone:
            raise ClientGone

    async def wait_for_all(self) -> None:
        """Returns when everything has come.  Raises AlbireoError, ClientGone."""
        self.interval = sys.maxsize  # nobody is to be woken for a token
        while self.open and self.error is None:
            await self.wait_for_more()
        if self.error is not None:
            raise self.error

    def take(self) -> dict[int, Piece]:
        """All that is pending."""
        taken, self.pending = self.pending, {}
        self._due = False
        return taken

    def _wake(self) -> None:
        self._due = True
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class Whole:
    """Puts replies to request number `prompt` into an inbox whose answers are taken as a whole: so
    it can be asked again (albireo/client/replies.py)."""

    __slots__ = ("_inbox", "_prompt")

    def __init__(self, inbox: Inbox, prompt: int) -> None:
        self._inbox = inbox
        self._prompt = prompt

    def __call__(self, reply: object) -> None:
        self._inbox.put(self._prompt, reply)

    def restart(self) -> None:
        self._inbox.forget(self._prompt)
