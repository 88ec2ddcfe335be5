"""The listening sockets of the HTTP gateways, bound by the supervisor before anything is started.

Each gateway has a TCP socket of its own on the one port (SO_REUSEPORT: the
kernel spreads connections evenly); all share the Unix socket.  The supervisor
keeps them open, so a gateway that dies loses no connection that still waits.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from pathlib import Path

from albireo.ipc.paths import PathError, require_socket_path

from .options import OptionError

_PATIENCE_S = 2.0
_LOOK_AGAIN_S = 0.02


class HttpSockets:
    """Bound and not yet listening.  Raises OptionError where that cannot be.

    address: "http://HOST:PORT" (https with `tls`) with the port that was bound; None without TCP.
    uds: path of the Unix socket, which close() removes; None without.
    """

    def __init__(
        self, http: str | None, uds: str | None, gateways: int, *, tls: bool = False
    ) -> None:
        self._scheme = "https" if tls else "http"
        self.address: str | None = None
        self.uds: str | None = None
        self._tcp: list[socket.socket] = []
        self._claim: socket.socket | None = None
        self._unix: socket.socket | None = None
        try:
            if http is not None:
                self._bind_tcp(http, gateways)
            if uds is not None:
                self._unix = _bind_unix(uds)
                self.uds = os.path.abspath(uds)
        except OptionError:
            self.close()
            raise

    def fds(self, gateway: int) -> dict[str, int]:
        """Descriptors for a gateway, by name; kept open here."""
        fds = {"http": self._tcp[gateway].fileno()} if self._tcp else {}
        if self._unix is not None:
            fds["uds"] = self._unix.fileno()
        return fds

    def close(self) -> None:
        """Closes all, and removes the Unix socket's file."""
        for each in (*self._tcp, *([self._claim] if self._claim else ())):
            each.close()
        if self._unix is not None:
            self._unix.close()
            with contextlib.suppress(OSError):
                os.unlink(self.uds or "")

    def _bind_tcp(self, http: str, gateways: int) -> None:
        host, port = parse_address(http)
        try:
            family, _, _, _, where = socket.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            _require_free(http, family, where)
            for _ in range(gateways):
                each = socket.socket(family, socket.SOCK_STREAM)
                self._tcp.append(each)
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                each.bind(where)
                where = each.getsockname()
            port = int(where[1])
            self._claim = _claim(http, port)
        except OSError as error:
            raise OptionError(f"--http {http}: {error.strerror or error}") from None
        shown = f"[{host}]" if ":" in host else host or "0.0.0.0"
        self.address = f"{self._scheme}://{shown}:{port}"


def parse_address(text: str, option: str = "--http") -> tuple[str, int]:
    """ "HOST:PORT", ":PORT" (all interfaces) or "[IPV6]:PORT".  Raises OptionError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise OptionError(f"{option} {text!r}: expected HOST:PORT such as 127.0.0.1:8000")
    return host, int(port)


def is_local(address: str) -> bool:
    """Whether only this machine can reach it."""
    host, _ = parse_address(address)
    return host == "localhost" or host == "::1" or host.startswith("127.")


def _require_free(http: str, family: int, where: tuple[object, ...]) -> None:
    """Raises OptionError when somebody listens there: SO_REUSEPORT alone would share the port."""
    if where[1] == 0:
        return
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(where)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise _in_use(http) from None


def _claim(http: str, port: int) -> socket.socket:
    """Keeps other nodes of this user off a port while nobody listens on it yet.

    A name in the abstract namespace is in no file system, belongs to one network
    as the port does, and goes with the process.
    """
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(f"\0albireo-{os.getuid()}-http-{port}")
    except OSError:
        claim.close()
        raise _in_use(http) from None
    return claim


def _in_use(http: str) -> OptionError:
    return OptionError(
        f"--http {http}: the port is in use; choose another, or 0 for any that is free"
    )


def _bind_unix(path: str) -> socket.socket:
    """0600; the file that a dead node has left is replaced, one that somebody serves is not."""
    try:
        require_socket_path(path)
    except PathError as error:
        raise OptionError(f"--uds {path}: {error}") from None
    _clear(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        os.chmod(path, 0o600)
    except OSError as error:
        listener.close()
        raise OptionError(f"--uds {path}: {error.strerror or error}") from None
    return listener


def remove_dead(path: str) -> None:
    """Removes a Unix socket that a node has left behind, once the last of its processes is gone.

    A socket that somebody serves is left, and so is whatever else has that name by now.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OptionError):
            _clear(path)
            return
        time.sleep(_LOOK_AGAIN_S)


def _clear(path: str) -> None:
    try:
        found = Path(path).lstat()
    except OSError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise OptionError(f"--uds {path}: there is a file of that name, and it is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            raise OptionError(f"--uds {path}: {error.strerror or error}") from None
    raise OptionError(f"--uds {path}: another program serves this socket")
