"""Reads a journal: the requests that were in flight when its router died."""

from __future__ import annotations

import logging
from collections import OrderedDict

import msgspec

from .records import Accepted, Continued, Opened, Record, Step
from .segments import Data, is_first, payloads

MAX_ENDED = 1024
"""Ended requests that a replay finds: of these a client may lack the end."""

_decode = msgspec.msgpack.Decoder(Record).decode
_log = logging.getLogger(__name__)


def replay(segments: list[Data], opened: Opened) -> tuple[list[Accepted], list[Accepted]]:
    """The requests that were in flight, and those that have ended last.

    segments: contents of the files, in their order.  What is before the last first
    one, or behind a record that is not whole, is ignored, as is a journal of another
    model or release.
    """
    found = _Found()
    first = max((place for place, data in enumerate(segments) if is_first(data)), default=0)
    for data in segments[first:]:
        whole = False
        for place, payload in enumerate(payloads(data)):
            try:
                record = _decode(payload)
            except msgspec.MsgspecError:
                break
            if (place == 0) != isinstance(record, Opened) or (place == 0 and record != opened):
                _log.warning("a journal of another model or release: %s, not %s", record, opened)
                return [], []
            whole = isinstance(record, Continued)
            found.take(record)
        if not whole:
            break
    return found.requests()


class _Found:
    """Requests as a replay finds them."""

    def __init__(self) -> None:
        self._requests: dict[int, Accepted] = {}
        self._of_client: dict[tuple[bytes, int], int] = {}
        self._of_answer: dict[int, Accepted] = {}
        self._open: dict[int, set[int]] = {}
        self._ended: OrderedDict[int, None] = OrderedDict()

    def take(self, record: Record) -> None:
        if isinstance(record, Accepted):
            before = self._of_client.get((record.owner, record.client_id), record.number)
            if before != record.number:  # it has ended, or went on
                self._drop(before)
            self._of_client[record.owner, record.client_id] = record.number
            self._requests.pop(record.number, None)
            self._requests[record.number] = record
            numbers = {record.number + choice for choice in record.tokens}
            self._open.setdefault(record.number, numbers)
            for number in numbers:
                self._of_answer[number] = record
        elif isinstance(record, Step):
            for number, index, token_ids in record.tokens:
                request = self._of_answer.get(number)
                if request is not None:
                    tokens = request.tokens[number - request.number]
                    if index == len(tokens):
                        tokens += token_ids
            for number in record.ended:
                self._end(number)
            for number in record.gone:
                self._drop(number)

    def requests(self) -> tuple[list[Accepted], list[Accepted]]:
        """Those in flight, and those that have ended."""
        ended = [self._requests.pop(number) for number in self._ended]
        return list(self._requests.values()), ended

    def _end(self, number: int) -> None:
        request = self._of_answer.get(number)
        if request is None:
            return
        still_open = self._open[request.number]
        still_open.discard(number)
        if not still_open:
            self._ended[request.number] = None
            if len(self._ended) > MAX_ENDED:
                self._drop(next(iter(self._ended)))

    def _drop(self, number: int) -> None:
        request = self._requests.pop(number, None)
        self._ended.pop(number, None)
        if request is not None:
            del self._open[number]
            for choice in request.tokens:
                del self._of_answer[number + choice]
