"""Where a node is, how a connection to it is opened, and what it means when nobody answers.

"/run/.../api.sock"      its Unix socket
"tls://host:port"        TCP with TLS, of a node with --listen
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import urlsplit

import msgspec

from albireo.ipc.paths import PathError, api_socket, require_socket_path

from .errors import AlbireoError, InvalidRequest, NodeNotRunning

if TYPE_CHECKING:
    import ssl

    from .tls import TlsConnection

Connection: TypeAlias = "socket.socket | TlsConnection"

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 90.0
"""Longest wait for an answer that is not tokens."""


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """shown: for messages.  node: its name, where the socket was found by that.

    path: of a Unix socket; or else host and port, and ca: whom to trust instead of the system's
        authorities (PEM file or directory).
    """

    shown: str
    node: str | None = None
    path: str = ""
    host: str = ""
    port: int = 0
    ca: str | None = None

    @classmethod
    def of(cls, address: str | None, node: str, ca: str | None) -> Endpoint:
        """Of what a caller of connect() gave.  Raises InvalidRequest."""
        if address is not None and "://" in address:
            return cls._of_url(address, ca)
        if ca is not None:
            raise InvalidRequest(
                "ca is for nodes over TCP: connect to tls://HOST:PORT with it", param="ca"
            )
        path = socket_path(address, node)
        return cls(shown=path, path=path, node=None if address else node)

    @classmethod
    def _of_url(cls, url: str, ca: str | None) -> Endpoint:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
        if not host or not port or parts.scheme != "tls" or parts.path.strip("/"):
            raise InvalidRequest(
                f"{url!r} is no address of a node: expected the path of a socket, or "
                "tls://HOST:PORT",
                param="path",
            )
        return cls(shown=url, host=host, port=port, ca=ca)

    def tls_context(self) -> ssl.SSLContext:
        """Raises InvalidRequest for a `ca` that cannot be used."""
        from albireo.ipc.tls import TlsError, client_context

        try:
            return client_context(self.ca)
        except TlsError as error:
            raise InvalidRequest(str(error), param="ca") from None

    def open(self, timeout_s: float) -> Connection:
        """A connected socket.  Raises OSError."""
        if self.host:
            from .tls import TlsConnection

            return TlsConnection.open(self.host, self.port, self.tls_context(), timeout_s)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout_s)
            connection.connect(self.path)
        except BaseException:
            connection.close()
            raise
        return connection

    async def open_async(self, make: Callable[[], asyncio.Protocol]) -> asyncio.Transport:
        """A transport whose protocol is `make`'s.  Raises OSError."""
        loop = asyncio.get_running_loop()
        if self.host:
            transport, _ = await loop.create_connection(
                make, self.host, self.port, ssl=self.tls_context(), server_hostname=self.host
            )
        else:
            transport, _ = await loop.create_unix_connection(make, self.path)
        return transport

    def error(self, error: OSError) -> AlbireoError:
        """The exception for a connection that could not be opened."""
        if not self.host:
            return connect_error(self.path, self.node, error)
        what = f"no node answers at {self.shown}: {error.strerror or error}"
        import ssl

        if isinstance(error, ssl.SSLCertVerificationError):
            return NodeNotRunning(
                f"the node at {self.shown} shows a certificate that is not trusted "
                f"({error.verify_message}): give its authority, or the certificate itself when it "
                "is self-signed, as ca (--ca FILE of commands), and connect to a name that is "
                "in it"
            )
        if isinstance(error, ssl.SSLError):
            return NodeNotRunning(f"{what}; is that the port of its --listen?")
        return NodeNotRunning(what, retry=True)


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
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return NodeNotRunning(
            f"the router at {path} ended while this client connected ({error.strerror}); the node "
            "starts it again: try once more",
            retry=True,
        )
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
