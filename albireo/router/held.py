"""What a slow reader has not taken yet: new tokens, merged answer by answer.

An answer waits in parts, each far smaller than a frame may be.  A part is made of whole Deltas:
a client that has its tokens has their text, too, and can go on behind it over another connection.
"""

from __future__ import annotations

from collections import deque

import msgspec

from albireo.ipc.protocol import Delta, End, Error, Logprobs
from albireo.ipc.rough_size import rough_bytes

MERGED_TEXTS = 64
MAX_PART_BYTES = 1024 * 1024


class Part:
    """Deltas of one answer that go as one."""

    __slots__ = (
        "end", "index", "logprobs", "prompt_logprobs", "prompt_tokens", "size", "texts",
        "token_ids",
    )  # fmt: skip

    def __init__(self, first: Delta) -> None:
        self.index = first.index
        self.prompt_tokens = first.prompt_tokens
        self.size = 0
        self.token_ids: list[int] = []
        self.texts: list[str] = []
        self.end: End | None = None
        self.logprobs: list[Logprobs] | None = None
        self.prompt_logprobs: list[Logprobs] | None = None

    def add(self, item: Delta) -> None:
        self.size += rough_bytes(item)
        self.token_ids += item.token_ids
        self.end = item.end
        if item.logprobs is not None:
            self.logprobs = (self.logprobs or []) + item.logprobs
        if item.prompt_logprobs is not None:
            self.prompt_logprobs = (self.prompt_logprobs or []) + item.prompt_logprobs
        if item.text:
            self.texts.append(item.text)
            if len(self.texts) == MERGED_TEXTS:
                # Many small strings take far more memory than their characters.
                self.texts = ["".join(self.texts)]

    def delta(self, request_id: int, choice: int) -> Delta:
        return Delta(
            request_id, self.index, self.token_ids, "".join(self.texts), self.end,
            choice, self.logprobs, self.prompt_logprobs, self.prompt_tokens,
        )  # fmt: skip


class Held:
    """What waits of one request: parts of its answers by choice, and the error that ended it."""

    __slots__ = ("answers", "error")

    def __init__(self) -> None:
        self.answers: dict[int, deque[Part]] = {}
        self.error: Error | None = None

    def add(self, item: Delta) -> None:
        parts = self.answers.setdefault(item.choice, deque())
        if not parts or parts[-1].size + rough_bytes(item) > MAX_PART_BYTES:
            parts.append(Part(item))
        parts[-1].add(item)

    def take(self, request_id: int) -> Delta:
        """The first part of an answer, of which there must be one."""
        choice, parts = next(iter(self.answers.items()))
        item = parts.popleft().delta(request_id, choice)
        if not parts:
            del self.answers[choice]
        return item


def halved(item: Delta) -> list[Delta]:
    """The same as two Deltas, for a step in which too much of a prompt was scored for one frame.

    The first has nothing but logprobs of the prompt; without any the Delta stays one.
    """
    scored = item.prompt_logprobs or []
    half = len(scored) // 2
    if not half:
        return [item]
    ahead = Delta(
        item.id, item.index, [], "", None, item.choice, None, scored[:half], item.prompt_tokens
    )
    return [ahead, msgspec.structs.replace(item, prompt_logprobs=scored[half:])]
