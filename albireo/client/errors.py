"""What can go wrong, as exceptions: one class for each error code of the protocol.

All of them are AlbireoError, say in their text what was wrong and what to do,
and have `retry`: whether the same request may succeed later.
"""

from __future__ import annotations

from typing import Self

from albireo.ipc.protocol import Error


class AlbireoError(Exception):
    """Base of all errors of this library.

    retry: the same request may succeed later.
    param: the parameter to blame, where one is.
    """

    def __init__(self, message: str, *, param: str | None = None, retry: bool = False) -> None:
        super().__init__(message)
        self.param = param
        self.retry = retry

    def copy(self) -> Self:
        """Another one that says the same: one that several threads raise would gather, and mix up,
        the tracebacks of all."""
        error = type(self)(str(self), param=self.param, retry=self.retry)
        error.__cause__ = self.__cause__
        return error


class InvalidRequest(AlbireoError, ValueError):
    """The request cannot be understood, or a value is out of its range."""


class TooLong(InvalidRequest):
    """Prompt and new tokens do not fit the context, the memory of a group, or a tenant's limit."""


class TooLarge(AlbireoError):
    """A message is larger than the node accepts."""


class ProtocolMismatch(AlbireoError):
    """Client library and node are of releases that do not understand each other."""


class AuthenticationError(AlbireoError):
    """The node asks for an API key, and this is none of its keys."""


class QueueFull(AlbireoError):
    """The node has as many requests, or as much text, as it takes; in all, or of this client."""


class Unavailable(AlbireoError):
    """The node cannot serve now: it is shutting down, or no group is running."""


class GroupFailed(AlbireoError):
    """The group that served the request has died."""


class InternalError(AlbireoError):
    """A fault in the node."""


class NodeNotRunning(AlbireoError, ConnectionError):
    """Nothing can be reached at the socket's path."""


class ConnectionLost(AlbireoError, ConnectionError):
    """The connection ended, and the request cannot go on; or this client was closed."""


class TimedOut(AlbireoError, TimeoutError):
    """The answer did not come within the time that the caller gave; it was cancelled."""


_BY_CODE: dict[str, type[AlbireoError]] = {
    "invalid_request": InvalidRequest,
    "too_long": TooLong,
    "too_large": TooLarge,
    "protocol": ProtocolMismatch,
    "unauthenticated": AuthenticationError,
    "queue_full": QueueFull,
    "unavailable": Unavailable,
    "group_failed": GroupFailed,
    "lost": ConnectionLost,
    "internal": InternalError,
}


def exception_of(error: Error) -> AlbireoError:
    """The exception for an Error message."""
    kind = _BY_CODE.get(error.code, AlbireoError)
    return kind(error.message, param=error.param, retry=error.retry)
