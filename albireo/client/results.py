"""What the library returns, and how Deltas add up to it."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from albireo.ipc.protocol import Delta

from .errors import AlbireoError
from .replies import Reply, as_error


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request, counted by the node."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Completion(msgspec.Struct, frozen=True):
    """A whole answer.

    finish_reason: "stop", "length" or "cancelled".
    stop_reason: the stop string or token id that ended it, where one did.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None
    usage: Usage


class Collector:
    """Adds up the Deltas of one request; calls `done` once, with its result or error."""

    __slots__ = ("_done", "_texts", "_token_ids")

    def __init__(self, done: Callable[[Completion | AlbireoError], None]) -> None:
        self._done = done
        self._token_ids: list[int] = []
        self._texts: list[str] = []

    def __call__(self, reply: Reply) -> None:
        if isinstance(reply, Delta):
            self._token_ids += reply.token_ids
            if reply.text:
                self._texts.append(reply.text)
            end = reply.end
            if end is not None:
                usage = Usage(end.prompt_tokens, end.completion_tokens)
                self._done(
                    Completion(
                        "".join(self._texts),
                        self._token_ids,
                        end.finish_reason,
                        end.stop_reason,
                        usage,
                    )
                )
        else:
            self._done(as_error(reply))
