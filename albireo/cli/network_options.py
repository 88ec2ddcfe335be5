"""Options of `albireo node start`: where clients reach the node, and who may."""

from __future__ import annotations

import click

from albireo.node.options import OptionError

from .ranges import range_of
from .several import with_options

_FILE = click.Path(exists=True, dir_okay=False, resolve_path=True)
"""By its whole path: the node may run elsewhere."""


network_options = with_options(
    click.option(
        "--http",
        metavar="HOST:PORT",
        help="Serve the OpenAI API over HTTP there; port 0 = any.",
    ),
    click.option("--host", metavar="HOST", help="The same in two options: 127.0.0.1 if not given,"),
    click.option("--port", type=click.IntRange(0, 65535), help="and port 8000 if not given."),
    click.option("--uds", metavar="PATH", help="Serve it on a Unix socket."),
    click.option(
        "--gateways",
        type=range_of("gateways"),
        default=1,
        show_default=True,
        help="Processes that serve it.",
    ),
    click.option(
        "--ssl-certfile",
        metavar="FILE",
        type=_FILE,
        help="HTTPS: certificate, with its chain (PEM),",
    ),
    click.option(
        "--ssl-keyfile",
        metavar="FILE",
        type=_FILE,
        help="and its key (PEM).",
    ),
    click.option(
        "--listen",
        metavar="HOST:PORT",
        help="Serve the client library over TCP, with TLS and API keys; port 0 = any.",
    ),
    click.option(
        "--tls-cert",
        metavar="FILE",
        type=_FILE,
        help="For --listen: certificate, with its chain (PEM),",
    ),
    click.option(
        "--tls-key",
        metavar="FILE",
        type=_FILE,
        help="and its key (PEM).",
    ),
    click.option("--api-key", metavar="KEY", help="Key that clients over HTTP and TCP must send."),
    click.option(
        "--api-key-file",
        metavar="FILE",
        type=_FILE,
        help="Keys of several clients: a line each, KEY or NAME:KEY.",
    ),
    click.option(
        "--allowed-origins",
        default="",
        metavar="ORIGIN,...",
        help="Web pages that may ask over HTTP (CORS); * = all.",
    ),
    click.option(
        "--stream-interval",
        type=range_of("stream_interval"),
        default=1,
        show_default=True,
        help="Tokens of a streamed event, but the first: fewer events cost less.",
    ),
)
"""HTTP, TCP, keys."""


def names_in(text: str) -> tuple[str, ...]:
    """Of a list with commas."""
    return tuple(name for each in text.split(",") if (name := each.strip()))


def http_address(http: str | None, host: str | None, port: int | None) -> str | None:
    """HOST:PORT of --http, or of --host and --port; None when HTTP is not asked for."""
    if host is None and port is None:
        return http
    if http is not None:
        raise OptionError("--http says the same as --host and --port: give the one or the others")
    host = "127.0.0.1" if host is None else host
    return f"{f'[{host}]' if ':' in host else host}:{8000 if port is None else port}"
