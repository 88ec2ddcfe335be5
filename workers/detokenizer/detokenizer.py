"""What a group's detokenizer knows and decides, without its sockets.

process.py feeds it requests and result rows and sends what comes out.  Rows
name requests; those of a request that is unknown here (aborted, ended, from
before a reset) are surplus tokens of plans made ahead, and are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from albireo.ipc.messages import Piece, Refused, Submit
from albireo.ipc.output_lane import OUTPUT_BYTES
from albireo.ipc.plan import (
    MAX_TOP_LOGPROBS,
    ROW_GRAMMAR_END,
    ROW_GRAMMAR_FAILED,
    ROW_NOT_FINITE,
    ROW_NOTHING_ALLOWED,
    Int32Array,
)
from albireo.ipc.rough_size import LOGPROB_BYTES, PIECE_BYTES, rough_bytes

from .logprobs import BytesOf
from .request import RequestText
from .stream import TextStream

_FAILURES = {
    ROW_NOT_FINITE: (
        "internal",
        "the model's logits were not finite (NaN or infinity): the weights are damaged or this "
        "dtype overflows; try --dtype float32",
    ),
    ROW_GRAMMAR_FAILED: (
        "invalid_request",
        "the grammar became too complex at this place of the answer: make it less ambiguous, its "
        "repetitions and alternatives shorter",
    ),
    ROW_NOTHING_ALLOWED: (
        "invalid_request",
        "no token is left here: those that allowed_token_ids and the grammar allow are excluded by "
        "bad_words, min_tokens or logit_bias (whichever the request has): allow more",
    ),
}
"""Code and message by what a row says in place of a token."""

_ROW_BYTES = PIECE_BYTES + 96
"""A token with its text, and some more."""
_RECORD_BYTES = LOGPROB_BYTES * (1 + MAX_TOP_LOGPROBS)


class Detokenizer:
    """All requests of one group.

    new_stream: streams for the model's tokenizer, from stream_factory.
    bytes_of: the bytes of its tokens.
    eos_token_ids: the model's own end tokens.
    """

    def __init__(
        self,
        new_stream: Callable[[bool], TextStream],
        bytes_of: BytesOf,
        eos_token_ids: Iterable[int],
    ) -> None:
        self._new_stream = new_stream
        self._bytes_of = bytes_of
        self._eos_token_ids = frozenset(eos_token_ids)
        self._running: dict[int, RequestText] = {}
        self._changed: dict[int, RequestText] = {}
        self._ended: dict[int, RequestText] = {}
        """What has news: answers that go on, and those that have ended."""
        self._new_bytes = 0  # of what is new, more or less; a step's rows cost no closer look

    def submit(self, request: Submit) -> None:
        """Expects the tokens of a new request from now on."""
        self._running[request.request] = RequestText(request, self._new_stream, self._eos_token_ids)

    def drop(self, request: int) -> None:
        """Forgets a request, with what it has not sent; does nothing if it is unknown."""
        self._running.pop(request, None)
        self._changed.pop(request, None)
        self._ended.pop(request, None)

    @property
    def has_ends(self) -> bool:
        """Whether answers have ended whose ends have not been taken."""
        return bool(self._ended)

    def reset(self) -> None:
        """Forgets all requests."""
        self._running.clear()
        self._changed.clear()
        self._ended.clear()

    def add_logprobs(self, records: Int32Array, rows: Iterable[tuple[int, int, int]]) -> None:
        """Takes the logprobs of one step (ipc/plan.py) and its rows; add_rows takes these next."""
        self._new_bytes += len(records) * _RECORD_BYTES
        tokens = {request: token for request, count, token in rows if count}
        for record in records:
            request = int(record[0])
            state = self._running.get(request)
            if state is not None:
                state.score(record, tokens.get(request), self._bytes_of)
                self._changed[request] = state

    def add_rows(self, rows: Sequence[tuple[int, int, int]]) -> tuple[list[int], list[Refused]]:
        """Takes the rows of one step: (request, count, token), as in ipc/plan.py.

        Returns the requests that a stop string has ended, which the scheduler
        cannot know, and the requests that have failed.
        """
        self._new_bytes += len(rows) * _ROW_BYTES
        running, changed = self._running, self._changed
        stopped: list[int] = []
        refused: list[Refused] = []
        for request, count, token in rows:
            state = running.get(request)
            if state is None:
                continue
            if count == 0 and token != ROW_GRAMMAR_END:
                self.drop(request)
                refused.append(Refused(request, *_FAILURES[token]))
                continue
            changed[request] = state
            if count == 0:
                state.end_without_token()
            elif not state.add(token):
                continue
            self._ended[request] = changed.pop(request)
            del running[request]
            if state.ended_by_text:
                stopped.append(request)
        return stopped, refused

    def take_pieces(self, room: int = OUTPUT_BYTES, *, ends: bool = True) -> list[Piece]:
        """What is new since the last call, a piece for each request, those that have ended last.

        Where that is more than `room` bytes, roughly, those that have ended come first, and what
        is left comes first in the next call.  ends: False leaves requests out that have ended, and
        all of them where there is more than room for.
        """
        if self._new_bytes >= room:
            pieces = self._take_parts(room) if ends else []
        else:
            pieces = [state.take_piece() for state in self._changed.values()]
            self._changed.clear()
            if ends and self._ended:
                pieces += [state.take_piece() for state in self._ended.values()]
                self._ended.clear()
        if not self._changed and not self._ended:
            self._new_bytes = 0
        return pieces

    def _take_parts(self, room: int) -> list[Piece]:
        pieces: list[Piece] = []
        for waiting in (self._ended, self._changed):
            for request, state in list(waiting.items()):
                if room <= 0:
                    return pieces
                pieces.append(state.take_part(room))
                room -= rough_bytes(pieces[-1])
                if state.has_news:
                    return pieces
                del waiting[request]
        return pieces
