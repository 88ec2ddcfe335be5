"""Work for the tokenizer: at most 64 texts of 256 KiB together, or one, are with it.

The rest waits here, where it can still be cancelled, and tenants take turns (text_jobs.py).

When the tokenizer dies, what it had is given to the next one.  One of those
texts may be what killed it, so they go one at a time, ahead of the others,
until all are answered; a text that was there at MAX_TRIES deaths is given up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from albireo.ipc.grammars import Grammar
from albireo.ipc.messages import (
    DecodeIds,
    EncodeChat,
    EncodeText,
    TextFailed,
    ToTokenizer,
)
from albireo.ipc.protocol import ChatMessage
from albireo.ipc.template import PLAIN, TemplateOptions
from albireo.ipc.tools import Tools

from .requests import Refusal
from .text_jobs import Answer, TextJob, WaitingTexts

MAX_OUTSTANDING = 64
MAX_OUTSTANDING_BYTES = 256 * 1024
MAX_BYTES = 64 * 1024 * 1024
MAX_TRIES = 3
ANSWER_TIMEOUT_S = 60.0

_encode = msgspec.msgpack.Encoder().encode
_log = logging.getLogger(__name__)


class TextQueue:
    """The tokenizer as the router sees it.

    send(peer, message): False when the peer is not there.
    clock: seconds, of any origin.
    """

    def __init__(
        self,
        send: Callable[[bytes, msgspec.Struct], bool],
        clock: Callable[[], float],
        first_key: int,
    ) -> None:
        self._send = send
        self._clock = clock
        self._next_key = first_key
        self._peer: bytes | None = None
        self._incarnation = -1
        self._ended = -1
        self._waiting = WaitingTexts()
        self._outstanding: dict[int, TextJob] = {}
        self._suspects = 0
        self._bytes = 0
        self._outstanding_bytes = 0

    def __len__(self) -> int:
        return len(self._waiting) + len(self._outstanding)

    def encode_text(
        self,
        text: str,
        add_special_tokens: bool,
        done: Callable[[Answer], None],
        words: tuple[str, ...] = (),
        grammar: Grammar | None = None,
        context: int = 0,
        tenant: str = "",
    ) -> TextJob:
        """Asks for the ids of a text, and of `words`, and for a grammar.

        context: what the text has to fit into, as in EncodeText.
        Raises Refusal when too much is waiting.
        """
        message = EncodeText(self._take_key(), text, add_special_tokens, words, grammar, context)
        return self._add(message, tenant, len(_encode(message)), done)

    def encode_chat(
        self,
        messages: list[ChatMessage],
        done: Callable[[Answer], None],
        words: tuple[str, ...] = (),
        grammar: Grammar | None = None,
        tools: Tools | None = None,
        context: int = 0,
        tenant: str = "",
        template: TemplateOptions = PLAIN,
    ) -> TextJob:
        """Asks for the ids of a conversation, and of `words`, and for a grammar, or that of tools.

        context: as in encode_text.
        Raises Refusal when too much is waiting.
        """
        message = EncodeChat(self._take_key(), messages, words, grammar, tools, context, template)
        return self._add(message, tenant, len(_encode(message)), done)

    def decode_ids(
        self,
        token_ids: list[int],
        skip_special_tokens: bool,
        done: Callable[[Answer], None],
        tenant: str = "",
    ) -> TextJob:
        """Asks for the text of ids.  Raises Refusal when too much is waiting."""
        message = DecodeIds(self._take_key(), token_ids, skip_special_tokens)
        return self._add(message, tenant, 8 * len(token_ids), done)

    def cancel(self, job: TextJob) -> None:
        """Nobody wants the answer any more."""
        job.cancelled = True
        if self._waiting.remove(job):
            self._close(job)

    def answer(self, message: Answer) -> None:
        """Takes an answer; one that nobody waits for is dropped."""
        job = self._outstanding.pop(message.key, None)
        if job is None:
            return
        self._outstanding_bytes -= job.size
        self._close(job)
        self._pump()
        if not job.cancelled:
            job.done(message)

    def joined(self, peer: bytes, incarnation: int) -> None:
        """A tokenizer is there; an older one is gone, whether that was said or not."""
        if incarnation <= self._ended or incarnation < self._incarnation:
            return
        if self._incarnation not in (-1, incarnation):
            self.down(self._incarnation)
        self._peer = peer
        self._incarnation = incarnation
        self._pump()

    def down(self, incarnation: int) -> None:
        """A tokenizer has died: what it had waits for the next one, ahead of the rest."""
        self._ended = max(self._ended, incarnation)
        if incarnation < self._incarnation:
            return
        self._peer = None
        self._incarnation = -1
        lost = list(self._outstanding.values())
        self._outstanding.clear()
        self._outstanding_bytes = 0
        again = []
        for job in lost:
            self._suspects += not job.tries
            job.tries += 1
            if job.cancelled or job.tries >= MAX_TRIES:
                self._close(job)
                self._give_up(
                    job, "internal", f"the tokenizer has died {MAX_TRIES} times on this text"
                )
            else:
                again.append(job)
        self._waiting.put_back(again)

    def expire(self) -> None:
        """Gives up the jobs whose deadline has passed; the tokenizer may still have them."""
        now = self._clock()
        for job in list(self._outstanding.values()):
            if now >= job.deadline:
                self._give_up(job, "unavailable", _no_answer())
                job.cancelled = True
        for job in self._waiting.overdue(now):
            self._waiting.remove(job)
            self._close(job)
            self._give_up(job, "unavailable", _no_answer())

    def retry(self) -> None:
        """Sends what waits; for a tokenizer that could not be reached a moment ago."""
        self._pump()

    def _take_key(self) -> int:
        self._next_key += 1
        return self._next_key

    def _add(
        self, message: ToTokenizer, tenant: str, size: int, done: Callable[[Answer], None]
    ) -> TextJob:
        if self._bytes and self._bytes + size > MAX_BYTES:
            raise Refusal(
                "queue_full",
                f"{len(self)} texts with {self._bytes} bytes wait for the tokenizer; this one of "
                f"{size} would exceed the limit of {MAX_BYTES}: try again later",
                retry=True,
            )
        job = TextJob(message, tenant, size, self._clock() + ANSWER_TIMEOUT_S, done)
        self._bytes += size
        self._waiting.add(job)
        self._pump()
        return job

    def _pump(self) -> None:
        while self._peer is not None and (job := self._waiting.next()) is not None:
            if not self._has_room(job) or not self._send(self._peer, job.message):
                return
            self._waiting.take(job)
            self._outstanding[job.message.key] = job
            self._outstanding_bytes += job.size

    def _has_room(self, job: TextJob) -> bool:
        """Whether the tokenizer may be given one more."""
        if not self._outstanding:
            return True
        most = 1 if self._suspects else MAX_OUTSTANDING
        size = self._outstanding_bytes + job.size
        return len(self._outstanding) < most and size <= MAX_OUTSTANDING_BYTES

    def _close(self, job: TextJob) -> None:
        self._bytes -= job.size
        self._suspects -= bool(job.tries)

    def _give_up(self, job: TextJob, code: str, message: str) -> None:
        if not job.cancelled:
            _log.warning("a text is given up: %s", message)
            job.done(TextFailed(job.message.key, code, message))


def _no_answer() -> str:
    return f"the tokenizer has not answered within {ANSWER_TIMEOUT_S:g} s; try again later"
