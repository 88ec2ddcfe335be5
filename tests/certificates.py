"""Certificates for tests, made by the `openssl` command."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple


class Pair(NamedTuple):
    """PEM files; the certificate is its own authority."""

    cert: str
    key: str


def self_signed(where: Path, name: str, alternatives: str = "DNS:localhost,IP:127.0.0.1") -> Pair:
    """A new pair, for the names in `alternatives`."""
    where.mkdir(parents=True, exist_ok=True)
    pair = Pair(str(where / f"{name}.pem"), str(where / f"{name}.key"))
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
            "-nodes", "-days", "2", "-subj", f"/CN={name}", "-addext",
            f"subjectAltName={alternatives}", "-out", pair.cert, "-keyout", pair.key,
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return pair
