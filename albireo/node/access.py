"""Who may connect from where: the options about keys, certificates and TCP, taken together."""

from __future__ import annotations

import socket

from albireo.ipc.keys import load_keys
from albireo.ipc.tls import TlsError, server_context

from .http_sockets import is_local, parse_address
from .options import NodeOptions, OptionError

_KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
"""Seconds, seconds, times: a client whose machine has vanished is noticed within two minutes."""


def check_access(options: NodeOptions) -> str | None:
    """Reads keys and certificates once; returns what the user should be warned of.

    Raises OptionError and KeyFileError.
    """
    keys = load_keys(options.api_key, options.api_key_file)
    if options.listen is not None:
        parse_address(options.listen, "--listen")
        missing = [
            name
            for name, given in (
                ("--tls-cert FILE", options.tls_cert),
                ("--tls-key FILE", options.tls_key),
                ("--api-key-file FILE (or --api-key KEY)", len(keys)),
            )
            if not given
        ]
        if missing:
            raise OptionError(
                f"--listen {options.listen}: clients over TCP, of this machine too, need TLS and "
                f"an API key: give {' and '.join(missing)} as well"
            )
    elif options.tls_cert is not None or options.tls_key is not None:
        raise OptionError(
            "--tls-cert and --tls-key are for clients over TCP: give --listen HOST:PORT as well, "
            "or --ssl-certfile and --ssl-keyfile for HTTPS"
        )
    if (options.ssl_certfile is None) != (options.ssl_keyfile is None):
        raise OptionError("--ssl-certfile and --ssl-keyfile go together: give both")
    if options.ssl_certfile is not None and options.http is None:
        raise OptionError("--ssl-certfile is for HTTPS: give --http HOST:PORT as well")
    for names, certificate, key in (
        ("--tls-cert and --tls-key", options.tls_cert, options.tls_key),
        ("--ssl-certfile and --ssl-keyfile", options.ssl_certfile, options.ssl_keyfile),
    ):
        if certificate is not None and key is not None:
            try:
                server_context(certificate, key)
            except TlsError as error:
                raise OptionError(f"{names}: {error}") from None
    if options.http is not None and not len(keys) and not is_local(options.http):
        return (
            f"--http {options.http} can be reached from other machines, and asks for no key: "
            "anybody there can use the model (--api-key-file sets keys)"
        )
    return None


class ListenSocket:
    """The bound TCP socket of --listen, which outlives a router.  Raises OptionError.

    address: "tls://HOST:PORT" with the port that was bound.
    """

    def __init__(self, listen: str) -> None:
        host, port = parse_address(listen, "--listen")
        try:
            family, _, _, _, where = socket.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self._socket = socket.socket(family, socket.SOCK_STREAM)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            # What is accepted inherits these.
            for option, value in ((socket.TCP_NODELAY, 1), *_KEEPALIVE):
                self._socket.setsockopt(socket.IPPROTO_TCP, option, value)
            self._socket.bind(where)
        except OSError as error:
            raise OptionError(f"--listen {listen}: {error.strerror or error}") from None
        shown = f"[{host}]" if ":" in host else host or socket.gethostname()
        self.address = f"tls://{shown}:{self._socket.getsockname()[1]}"

    @property
    def fds(self) -> dict[str, int]:
        """For the router, by name; kept open here."""
        return {"tcp": self._socket.fileno()}

    def close(self) -> None:
        self._socket.close()
