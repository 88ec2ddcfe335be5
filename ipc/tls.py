"""TLS, for clients over TCP and for HTTPS: version 1.2 and newer, Python's default ciphers.

Apart from the rest because importing `ssl` takes milliseconds that a client over
the Unix socket does not need.
"""

from __future__ import annotations

import ssl
from pathlib import Path

HANDSHAKE_TIMEOUT_S = 10.0


class TlsError(ValueError):
    """A certificate or a key cannot be used; the text says which, and what would work."""


def server_context(certificate: str, key: str) -> ssl.SSLContext:
    """Of PEM files: a certificate with its chain, and its private key.  Raises TlsError."""
    for path in (certificate, key):
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise TlsError(f"{path} cannot be read: {error.strerror or error}") from None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # An encrypted key would have OpenSSL ask the terminal for its password.
        context.load_cert_chain(certificate, key, password=lambda: b"")
    except (ssl.SSLError, ValueError) as error:
        raise TlsError(
            f"certificate {certificate} and key {key} cannot be used: {error}; both must be PEM, "
            "belong together, and the key must have no password"
        ) from None
    return context


def client_context(authorities: str | None) -> ssl.SSLContext:
    """Trusts the PEM file (or directory) `authorities`, or the system's where it is None.

    The server's name is always checked.  Raises TlsError.
    """
    where = "capath" if authorities is not None and Path(authorities).is_dir() else "cafile"
    try:
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, **{where: authorities})
    except (OSError, ssl.SSLError) as error:
        raise TlsError(
            f"ca {authorities} cannot be used: {error}; give a PEM file of certificates to "
            "trust, such as the node's own when it is self-signed"
        ) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
