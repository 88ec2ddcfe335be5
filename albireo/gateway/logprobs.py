"""Log-probabilities in the three forms that OpenAI's and vLLM's clients expect."""

from __future__ import annotations

import codecs
from collections.abc import Set

import msgspec

from albireo.ipc.protocol import Logprobs, TokenLogprob

LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have."""


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Of completions: four lists with an entry for each token.

    tokens: texts; "bytes:\\\\x.." where a token is no whole text.  text_offset: in
    characters of the choice's text.  Of the very first token of an echoed prompt
    nothing is known: null.  top_logprobs: the token itself, and the best ones.
    """

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class TopLogprob(msgspec.Struct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct, kw_only=True):
    """bytes: of the token; several tokens may make one character."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    content: list[ChatLogprob]
    refusal: None = None


class PromptLogprob(msgspec.Struct, kw_only=True):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


_NO_CHARACTER = "\ufffd"


class Offsets:
    """Where each token of an answer begins in its choice's text, token by token.

    at: where the answer itself begins.  strips_first_space: as the node's welcome has it.
    hidden: tokens that the text leaves out.
    """

    __slots__ = ("_at", "_decoder", "_hidden", "_strips_space")

    def __init__(
        self, at: int = 0, strips_first_space: bool = False, hidden: Set[int] = frozenset()
    ) -> None:
        self._at = at
        self._strips_space = strips_first_space
        self._hidden = hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, token: TokenLogprob) -> int:
        """The offset of the token, in characters; counts it in."""
        at = self._at
        if token.token_id not in self._hidden:
            self._at += len(self._shown(self._decoder.decode(token.text)))
        return at

    def _shown(self, token: str) -> str:
        """What of it the text has."""
        if self._strips_space and token:
            self._strips_space = False
            return token.removeprefix(" ")
        return token


class EchoOffsets(Offsets):
    """The same of an echoed prompt, behind its first token.

    Not all that its tokens have is in the text that the client sent: no begin token, and
    no space that SentencePiece puts before a text.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str, first: bytes) -> None:
        super().__init__()
        begin = self._decoder.decode(first)
        self._at = len(begin) if text.startswith(begin) else 0
        self._text = text

    def _shown(self, token: str) -> str:
        bare = token.removeprefix(" ")
        if self._text.startswith(bare, self._at) and not self._text.startswith(token, self._at):
            token = bare
        return token[: len(self._text) - self._at]


def echo_logprobs(rows: list[Logprobs], text: str, first: str) -> CompletionLogprobs:
    """Of an echoed prompt.

    rows: of its tokens but the first, of which nothing is known but its text, `first`; its
    bytes, where it ends within a character, are those of the prompt that no other token has.
    """
    begin, whole = first.encode(), text.encode()
    others = b"".join(row.token.text for row in rows)
    if _NO_CHARACTER in first and others and whole.endswith(others):
        begin = whole.removesuffix(others)
    answer = CompletionLogprobs(
        text_offset=[0], token_logprobs=[None], tokens=[_name(begin)], top_logprobs=[None]
    )
    return joined([answer, completion_logprobs(rows, EchoOffsets(text, begin))])


def completion_logprobs(rows: list[Logprobs], offsets: Offsets) -> CompletionLogprobs:
    answer = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
    for row in rows:
        token = row.token
        answer.text_offset.append(offsets.next(token))
        answer.tokens.append(_name(token.text))
        answer.token_logprobs.append(_finite(token.logprob))
        best: dict[str, float] = {}
        for each in (*row.top, token):
            best.setdefault(_name(each.text), _finite(each.logprob))
        answer.top_logprobs.append(best)
    return answer


def joined(parts: list[CompletionLogprobs]) -> CompletionLogprobs:
    """Several, one behind the other."""
    answer = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
    for part in parts:
        answer.text_offset += part.text_offset
        answer.token_logprobs += part.token_logprobs
        answer.tokens += part.tokens
        answer.top_logprobs += part.top_logprobs
    return answer


def chat_logprobs(rows: list[Logprobs]) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            ChatLogprob(
                token=_readable(row.token.text),
                logprob=_finite(row.token.logprob),
                bytes=list(row.token.text),
                top_logprobs=[_top(each) for each in row.top],
            )
            for row in rows
        ]
    )


def prompt_logprobs(rows: list[Logprobs]) -> PromptLogprobs:
    """vLLM's form: null for the first token of the prompt, then a map by token id."""
    answer: PromptLogprobs = [None]
    for row in rows:
        answer.append(
            {
                str(each.token_id): PromptLogprob(
                    logprob=_finite(each.logprob),
                    rank=each.rank,
                    decoded_token=_readable(each.text),
                )
                for each in (row.token, *row.top)
            }
        )
    return answer


def _top(token: TokenLogprob) -> TopLogprob:
    return TopLogprob(
        token=_readable(token.text), logprob=_finite(token.logprob), bytes=list(token.text)
    )


def _finite(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST


def _readable(text: bytes) -> str:
    return text.decode(errors="replace")


def _name(text: bytes) -> str:
    """Different for different bytes, as a key of a map has to be."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)
