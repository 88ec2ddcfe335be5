"""What a slow reader has not taken yet: new tokens, merged answer by answer."""

from __future__ import annotations

from albireo.ipc.protocol import Delta, End, Error, Logprobs

MERGED_TEXTS = 64
_LOGPROB_BYTES = 24


class HeldAnswer:
    """New tokens of one answer that wait for a slow reader."""

    __slots__ = ("end", "index", "logprobs", "prompt_logprobs", "texts", "token_ids")

    def __init__(self, index: int) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.texts: list[str] = []
        self.end: End | None = None
        self.logprobs: list[Logprobs] | None = None
        self.prompt_logprobs: list[Logprobs] | None = None

    def add(self, item: Delta) -> None:
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
            choice, self.logprobs, self.prompt_logprobs,
        )  # fmt: skip


class Held:
    """What waits of one request: its answers by choice, and the error that ended it."""

    __slots__ = ("answers", "error")

    def __init__(self) -> None:
        self.answers: dict[int, HeldAnswer] = {}
        self.error: Error | None = None


def rough_bytes(item: Delta) -> int:
    """Of a Delta in a frame."""
    size = 32 + 4 * len(item.token_ids) + len(item.text)
    for scored in (item.logprobs, item.prompt_logprobs):
        if scored:
            size += len(scored) * _LOGPROB_BYTES * (1 + len(scored[0].top))
    return size
