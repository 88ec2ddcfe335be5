"""Errors as OpenAI's clients expect them: a status, and {"error": {...}} as the body."""

from __future__ import annotations

import msgspec

from albireo.client import (
    AlbireoError,
    ConnectionLost,
    GroupFailed,
    InvalidRequest,
    NodeNotRunning,
    QueueFull,
    TimedOut,
    TooLarge,
    TooLong,
    Unavailable,
)

RETRY_AFTER_S = 1
_LATER = (QueueFull, Unavailable, GroupFailed, ConnectionLost, NodeNotRunning, TimedOut)


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """What was wrong and what to do.

    type: a class of errors.  param: the field to blame.  code: for programs.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(msgspec.Struct, frozen=True):
    error: ErrorBody


class HttpError(Exception):
    """Ends a request with a status and an error body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.answer = ErrorAnswer(ErrorBody(message=message, type=kind, param=param, code=code))

    def body(self) -> bytes:
        return msgspec.json.encode(self.answer)


def invalid(message: str, param: str | None = None, code: str | None = None) -> HttpError:
    """400: the request cannot be served as it is."""
    return HttpError(400, message, param=param, code=code)


def unavailable(message: str) -> HttpError:
    """503: the same request may succeed later."""
    return HttpError(
        503,
        message,
        kind="service_unavailable",
        code="unavailable",
        headers=((b"retry-after", str(RETRY_AFTER_S).encode()),),
    )


def internal(message: str, code: str = "internal") -> HttpError:
    """500: the same request would fail again, and OpenAI's clients are told not to try."""
    return HttpError(
        500, message, kind="server_error", code=code, headers=((b"x-should-retry", b"false"),)
    )


def http_error(error: AlbireoError, grammar: str = "response_format") -> HttpError:
    """What the node answered, in HTTP's words.  grammar: the field that asked for one."""
    text = str(error)
    if isinstance(error, TooLong):
        return invalid(text, _public(error.param), "context_length_exceeded")
    if isinstance(error, InvalidRequest):
        param = grammar if error.param == "grammar" else _public(error.param)
        return invalid(text, param)
    if isinstance(error, TooLarge):
        return HttpError(413, text, code="too_large")
    if isinstance(error, GroupFailed) and not error.retry:
        return internal(text, "group_failed")
    if isinstance(error, _LATER):
        return unavailable(text)
    return internal(text)


def _public(param: str | None) -> str | None:
    """The name that a field of the protocol has in OpenAI's requests."""
    return {"prompt_ids": "prompt", "token_ids": "tokens", "text": "prompt"}.get(param or "", param)
