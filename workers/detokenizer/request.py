"""One request's way from tokens to what its client sees.

Each token goes through the same steps: does it end the answer (ipc/stopping,
as in the scheduler), which text has become certain, is a stop string in it.
What is new collects here until the process sends it on: after every step, or
later, merged, when the router has given no credit.  What is more than one
Output has room for goes in parts, each of whole tokens with their text: who
has a token can go on behind it.  Nothing is ever added after the end.

The token that ends an answer is in its ids and in completion_tokens; a stop
token's text is not shown.  The token that completes a stop string counts as
well, and so does its text up to the stop string.  "stop" beats "length".
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from itertools import accumulate

from albireo.ipc.messages import Piece, Submit
from albireo.ipc.plan import Int32Array
from albireo.ipc.protocol import End, Logprobs
from albireo.ipc.rough_size import LOGPROB_BYTES, TOKEN_BYTES
from albireo.ipc.stopping import end_of_tokens

from .logprobs import BytesOf, read_logprobs
from .stop_strings import StopMatcher
from .stream import TextStream


class RequestText:
    """State of one request in the detokenizer.

    prompt_tokens: of the prompt as the client sent it.  Behind them a resumed request has the
        tokens that its client has had, with their text: they bring the state to where it was.
    silent_stops: the model's own end tokens, which are no stop_reason.
    end: None until the answer is complete.
    """

    __slots__ = (
        "_best",
        "_generated",
        "_ids",
        "_logprobs",
        "_matcher",
        "_max_tokens",
        "_min_tokens",
        "_prompt_best",
        "_prompt_ids",
        "_prompt_logprobs",
        "_scored",
        "_sent",
        "_silent_stops",
        "_stop_token_ids",
        "_stream",
        "_texts",
        "end",
        "prompt_tokens",
        "request",
    )

    def __init__(
        self,
        submit: Submit,
        new_stream: Callable[[bool], TextStream],
        silent_stops: frozenset[int],
    ) -> None:
        self.request = submit.request
        self.end: End | None = None
        self._stream = new_stream(submit.skip_special_tokens)
        self._matcher = StopMatcher(submit.stop, submit.include_stop) if submit.stop else None
        self.prompt_tokens = len(submit.prompt_ids) - submit.resumed
        self._max_tokens = submit.max_tokens
        self._min_tokens = submit.min_tokens
        self._stop_token_ids = frozenset(submit.stop_token_ids)
        self._silent_stops = silent_stops
        self._generated = 0
        self._sent = 0
        self._ids: list[int] = []
        self._texts: list[str] = []
        self._best = submit.logprobs
        self._prompt_best = submit.prompt_logprobs
        self._prompt_ids = submit.prompt_ids if submit.prompt_logprobs >= 0 else []
        self._scored = 1  # positions of the prompt; the first one has nothing before it
        self._logprobs: list[Logprobs] | None = [] if submit.logprobs >= 0 else None
        self._prompt_logprobs: list[Logprobs] | None = None
        for token in submit.prompt_ids[self.prompt_tokens :]:
            self.add(token)
        self._sent, self._ids, self._texts = submit.resumed, [], []

    def score(self, record: Int32Array, token: int | None, bytes_of: BytesOf) -> None:
        """Takes a logprob record of the request, of the new token before the token itself.

        A position of the prompt is scored again when the request is computed again.
        """
        position = int(record[1])
        if position >= self.prompt_tokens:
            if self._logprobs is not None and token is not None:
                self._logprobs.append(read_logprobs(record, token, self._best, bytes_of))
        elif position == self._scored and self._prompt_ids:
            found = read_logprobs(record, self._prompt_ids[position], self._prompt_best, bytes_of)
            self._scored += 1
            self._prompt_logprobs = self._prompt_logprobs or []
            self._prompt_logprobs.append(found)

    def add(self, token: int) -> bool:
        """Takes the next token; True when the answer is complete with it."""
        self._generated = generated = self._generated + 1
        self._ids.append(token)
        reason = end_of_tokens(
            token, generated, self._min_tokens, self._max_tokens, self._stop_token_ids
        )
        if reason is None and self._matcher is None:
            self._texts.append(self._stream.add(token))
            return False
        return self._add_slowly(token, reason)

    def end_without_token(self) -> None:
        """The answer is complete: its grammar can only stop."""
        text = self._stream.flush()
        stop: str | None = None
        if self._matcher is not None:
            text, stop = self._matcher.add(text, self._generated >= self._min_tokens)
            text += self._matcher.flush()
        self._finish(text, "stop", stop)

    def _add_slowly(self, token: int, reason: str | None) -> bool:
        text = "" if reason == "stop" else self._stream.add(token)
        if reason is not None:
            text += self._stream.flush()
        if self._matcher is not None:
            text, stop = self._matcher.add(text, self._generated >= self._min_tokens)
            if stop is not None:
                return self._finish(text, "stop", stop)
            if reason is not None:
                text += self._matcher.flush()
        if reason is None:
            self._texts.append(text)
            return False
        reported = reason == "stop" and token not in self._silent_stops
        return self._finish(text, reason, token if reported else None)

    def _finish(self, text: str, reason: str, stop_reason: str | int | None) -> bool:
        self._texts.append(text)
        self.end = End(reason, stop_reason, self.prompt_tokens, self._generated)
        return True

    @property
    def ended_by_text(self) -> bool:
        """Whether a stop string has ended the answer, so that the scheduler has to be told."""
        return self.end is not None and isinstance(self.end.stop_reason, str)

    @property
    def has_news(self) -> bool:
        """Whether there is something to take."""
        return bool(self._texts or self._prompt_logprobs)

    def take_piece(self) -> Piece:
        """What is new since the last call."""
        ids = self._ids
        piece = Piece(
            self.request, self._sent, ids, "".join(self._texts), self.end,
            self._logprobs, self._prompt_logprobs,
        )  # fmt: skip
        self._sent += len(ids)
        self._ids = []
        self._texts = []
        if self._logprobs is not None:
            self._logprobs = []
        self._prompt_logprobs = None
        return piece

    def take_part(self, room: int) -> Piece:
        """What is new since the last call; of more than `room` bytes, roughly, the beginning."""
        count = self._fitting(room)
        if count is None:
            return self.take_piece()
        scored, logprobs = self._prompt_logprobs or [], self._logprobs
        tokens = max(0, count - len(scored))
        piece = Piece(
            self.request, self._sent, self._ids[:tokens], "".join(self._texts[:tokens]), None,
            None if logprobs is None else logprobs[:tokens], scored[:count] or None,
        )  # fmt: skip
        self._sent += tokens
        del self._ids[:tokens], self._texts[:tokens]
        if logprobs is not None:
            del logprobs[:tokens]
        self._prompt_logprobs = scored[count:] or None
        return piece

    def _fitting(self, room: int) -> int | None:
        """How many of the new positions, those of the prompt first, fill the room with the last
        one of them; None for all there are."""
        scored = len(self._prompt_logprobs or ())
        own = TOKEN_BYTES + (LOGPROB_BYTES * (1 + self._best) if self._logprobs is not None else 0)
        sizes = [LOGPROB_BYTES * (1 + self._prompt_best)] * scored
        sizes += [own + len(text) for text in self._texts]
        count = bisect_left(list(accumulate(sizes)), room) + 1
        return count if count < len(sizes) else None
