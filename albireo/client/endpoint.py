"""Where a node's socket is, and what it means when nobody answers there."""

from __future__ import annotations

from pathlib import Path

from albireo.ipc.paths import PathError, api_socket, require_socket_path

from .errors import AlbireoError, InvalidRequest, NodeNotRunning

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 90.0
"""Longest wait for an answer that is not tokens."""


def socket_path(path: str | None, node: str) -> str:
    """The socket to connect to: `path`, or the one of the node of that name."""
    try:
        found = api_socket(node) if path is None else Path(path)
        require_socket_path(found)
    except PathError as error:
        raise InvalidRequest(str(error), param="node" if path is None else "path") from None
    return str(found)


def connect_error(path: str, node: str | None, error: OSError) -> AlbireoError:
    """The exception for a connect() that failed.  `node` is None where a path was given."""
    if isinstance(error, PermissionError):
        return NodeNotRunning(f"the socket {path} belongs to another user: {error.strerror}")
    what = f"no node answers at {path}" if node is None else f"no node named {node!r} is running"
    start = "albireo node start" + (f" --name {node}" if node not in (None, "default") else "")
    reason = (
        "there is no such socket"
        if isinstance(error, FileNotFoundError)
        else "nobody listens there"
        if isinstance(error, ConnectionRefusedError)
        else str(error)
    )
    return NodeNotRunning(
        f"{what} ({path}: {reason}). Start one with `{start}` and wait for its ready line; "
        "a node that runs for another user, or with another ALBIREO_RUNTIME_DIR or "
        "XDG_RUNTIME_DIR, is reached by the path of its socket",
        retry=True,
    )
