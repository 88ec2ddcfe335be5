"""What the library returns, and how Deltas add up to it."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from albireo.ipc.protocol import Delta, End, Logprobs
from albireo.ipc.tools import ToolCall, Tools

from .errors import AlbireoError
from .replies import Reply, as_error
from .tool_calls import read_tool_calls


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request, counted by the node."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Choice(msgspec.Struct, frozen=True):
    """One of n answers.

    finish_reason: "stop", "length", "cancelled", or "tool_calls" where there are whole ones
        and it would be "stop".
    stop_reason: the stop string or token id that ended it, where one did.
    logprobs: one for each token, where asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None
    logprobs: list[Logprobs] | None = None
    tool_calls: list[ToolCall] = []


class Completion(msgspec.Struct, frozen=True):
    """A whole answer: the fields of its first choice, and all n of them as `choices`.

    usage: of all choices; the prompt counts once.
    prompt_logprobs: of the prompt's tokens from the second on, where asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None
    usage: Usage
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs] | None = None
    choices: list[Choice] = []
    tool_calls: list[ToolCall] = []


def with_tool_calls(answer: Completion, tools: Tools | None, style: str) -> Completion:
    """The calls taken out of the answers' texts, where tools were given.

    style: Welcome.tool_style.
    """
    if tools is None or not tools.bind:
        return answer
    names = [each.name for each in tools.functions]
    choices = [_read_choice(choice, names, style) for choice in answer.choices]
    first = choices[0]
    return msgspec.structs.replace(
        answer,
        text=first.text,
        finish_reason=first.finish_reason,
        tool_calls=first.tool_calls,
        choices=choices,
    )


def _read_choice(choice: Choice, names: list[str], style: str) -> Choice:
    text, calls, reason = read_tool_calls(choice.text, choice.finish_reason, names, style)
    return msgspec.structs.replace(choice, text=text, finish_reason=reason, tool_calls=calls)


class Collector:
    """Adds up the Deltas of one request; calls `done` once, with its result or error."""

    __slots__ = ("_answers", "_done", "_n", "_open", "_prompt_logprobs")

    def __init__(self, n: int, done: Callable[[Completion | AlbireoError], None]) -> None:
        self._done = done
        self._n = n
        self.restart()

    def restart(self) -> None:
        """Forgets what has come: nobody has seen it."""
        self._answers = [_Answer() for _ in range(self._n)]
        self._open = self._n
        self._prompt_logprobs: list[Logprobs] | None = None

    def __call__(self, reply: Reply) -> None:
        if not isinstance(reply, Delta):
            self._done(as_error(reply))
            return
        if reply.prompt_logprobs is not None:
            self._prompt_logprobs = (self._prompt_logprobs or []) + reply.prompt_logprobs
        self._answers[reply.choice].add(reply)
        if reply.end is not None:
            self._open -= 1
            if not self._open:
                self._done(self._completion())

    def _completion(self) -> Completion:
        choices = [answer.choice() for answer in self._answers]
        ends = [answer.end for answer in self._answers if answer.end is not None]
        first = choices[0]
        return Completion(
            first.text,
            first.token_ids,
            first.finish_reason,
            first.stop_reason,
            Usage(ends[0].prompt_tokens, sum(end.completion_tokens for end in ends)),
            first.logprobs,
            self._prompt_logprobs,
            choices,
        )


class _Answer:
    """What has come of one choice."""

    __slots__ = ("_logprobs", "_texts", "_token_ids", "end")

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[Logprobs] | None = None
        self.end: End | None = None

    def add(self, delta: Delta) -> None:
        self._token_ids += delta.token_ids
        if delta.text:
            self._texts.append(delta.text)
        if delta.logprobs is not None:
            self._logprobs = self._logprobs or []
            self._logprobs += delta.logprobs
        self.end = delta.end

    def choice(self) -> Choice:
        assert self.end is not None
        return Choice(
            "".join(self._texts),
            self._token_ids,
            self.end.finish_reason,
            self.end.stop_reason,
            self._logprobs,
        )
