"""Where a node's files are, and the environment variables that move them.

The node makes these places, the client library only looks them up: both find
the same socket because both ask here.  Nothing in this module creates or
changes a file.

    runtime_root()/<node>/    0700: *.sock, *.zmq, node.json, timeline/, lock; gone with the node
    state_dir()/<node>.log    the log of a node, kept when it ends
    cache_dir()/              models and compiled kernels, safe to delete

Every ALBIREO_ variable is in VARIABLES; a value that cannot be used is an error.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

DEFAULT_NODE = "default"
API_SOCKET = "api.sock"
CONTROL_SOCKET = "node.sock"
OUTPUT_SOCKET = "out.sock"
MAX_SOCKET_PATH_BYTES = 107
"""What sockaddr_un holds on Linux, without the closing zero."""

VARIABLES: Mapping[str, str] = MappingProxyType(
    {
        "ALBIREO_RUNTIME_DIR": "directory of the nodes' sockets, instead of "
        "$XDG_RUNTIME_DIR/albireo or /tmp/albireo-<uid>",
        "ALBIREO_STATE_DIR": "directory of the nodes' logs, instead of "
        "$XDG_STATE_HOME/albireo or ~/.local/state/albireo",
        "ALBIREO_CACHE_DIR": "directory of models and compiled kernels, instead of "
        "$XDG_CACHE_HOME/albireo or ~/.cache/albireo",
    }
)
"""The environment variables that Albireo reads, and what each is for."""

_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
_LONGEST_SOCKET_NAME = "router.zmq"


class PathError(ValueError):
    """A directory, a node's name or a variable cannot be used; the text says what to change."""


def runtime_root() -> Path:
    """The directory that holds a directory for each node.  Raises PathError."""
    chosen = _variable("ALBIREO_RUNTIME_DIR")
    if chosen is not None:
        return chosen
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(session) and os.path.isdir(session):
        return Path(session) / "albireo"
    shared = Path(f"/tmp/albireo-{os.getuid()}")
    _require_own(shared)
    return shared


def state_dir() -> Path:
    """The directory of logs.  Raises PathError."""
    return _variable("ALBIREO_STATE_DIR") or _home("XDG_STATE_HOME", ".local/state") / "albireo"


def cache_dir() -> Path:
    """The directory of models and compiled kernels.  Raises PathError."""
    return _variable("ALBIREO_CACHE_DIR") or _home("XDG_CACHE_HOME", ".cache") / "albireo"


def node_dir(node: str = DEFAULT_NODE) -> Path:
    """The runtime directory of a node.

    Raises PathError for a name that cannot be part of a path, and when the
    paths of the node's sockets would be longer than the system allows.
    """
    if not _NODE_NAME.fullmatch(node):
        raise PathError(
            f"{node!r} cannot name a node: 1 to 32 letters, digits, '_', '.' or '-' are allowed, "
            "the first a letter or digit"
        )
    path = runtime_root() / node
    require_socket_path(path / _LONGEST_SOCKET_NAME)
    return path


def api_socket(node: str = DEFAULT_NODE) -> Path:
    """The socket on which a node's clients connect.  Raises PathError."""
    return node_dir(node) / API_SOCKET


def log_path(node: str = DEFAULT_NODE) -> Path:
    """The log of a node, running or not.  Raises PathError."""
    return state_dir() / f"{node}.log"


def require_socket_path(path: str | Path) -> None:
    """Raises PathError when a Unix socket cannot have this path."""
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH_BYTES:
        raise PathError(
            f"the socket path {path} has {length} bytes; the system allows "
            f"{MAX_SOCKET_PATH_BYTES}: use a shorter node name, or set ALBIREO_RUNTIME_DIR to a "
            "shorter directory"
        )


def _variable(name: str) -> Path | None:
    value = os.environ.get(name)
    if value is None:
        return None
    if not os.path.isabs(value):
        raise PathError(f"{name} must be an absolute path, not {value!r}")
    return Path(value)


def _home(variable: str, below: str) -> Path:
    """A base directory of the XDG specification, which ignores relative values."""
    value = os.environ.get(variable, "")
    return Path(value) if os.path.isabs(value) else Path.home() / below


def _require_own(path: Path) -> None:
    """In /tmp anybody could have made the directory: refuse one that is not ours."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PathError(
            f"{path} (mode {stat.S_IMODE(found.st_mode):o}, owner {found.st_uid}) is not a "
            f"directory that user {os.getuid()} alone can write to; remove it, or set "
            "ALBIREO_RUNTIME_DIR"
        )
