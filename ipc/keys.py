"""API keys: who may ask over HTTP or TCP, and under which name.

A file has one key a line, or `name:key`; empty lines and lines that begin with #
are skipped.  A key's name is the tenant of its requests, for fairness among
them.  Keys are compared by digests of one length, all of them, in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

MAX_KEYS = 1024
MIN_KEY_CHARS = 8
MAX_NAME_CHARS = 64


class KeyFileError(ValueError):
    """The keys cannot be used; the text says which line, and never a key."""


class ApiKeys:
    """Names by key; empty = no key is asked for."""

    def __init__(self, keys: Iterable[tuple[str, str]] = ()) -> None:
        self._keys = [(name, _digest(key)) for name, key in keys]
        if len(self._keys) > MAX_KEYS:
            raise KeyFileError(f"{len(self._keys)} API keys are too many; at most {MAX_KEYS}")

    def __len__(self) -> int:
        return len(self._keys)

    def name_of(self, key: str) -> str | None:
        """The name of a key; None where it is none of ours."""
        given = _digest(key)
        found = None
        for name, known in self._keys:
            if hmac.compare_digest(given, known):
                found = name
        return found

    def name_of_bearer(self, authorization: str) -> str | None:
        """The name of the key in an HTTP Authorization header; None where it is none of ours."""
        scheme, _, key = authorization.partition(" ")
        found = self.name_of(key.strip())
        return found if scheme.lower() == "bearer" else None


def load_keys(single: str | None, path: str | None) -> ApiKeys:
    """Keys of `--api-key` and of `--api-key-file`.  Raises KeyFileError."""
    keys: list[tuple[str, str]] = []
    if single is not None:
        keys.append(("default", _checked(single, "--api-key")))
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise KeyFileError(f"--api-key-file {path} cannot be read: {error}") from None
        before = len(keys)
        keys += _parse(text, path)
        if len(keys) == before:
            raise KeyFileError(f"--api-key-file {path} has no key in it: one a line, or name:key")
    return ApiKeys(keys)


def _parse(text: str, path: str) -> Iterable[tuple[str, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, colon, key = line.partition(":")
        if not colon:
            name, key = f"key{number}", line
        where = f"{path}, line {number}"
        if not 1 <= len(name) <= MAX_NAME_CHARS:
            raise KeyFileError(f"{where}: a name has 1 to {MAX_NAME_CHARS} characters")
        yield name.strip(), _checked(key.strip(), where)


def _checked(key: str, where: str) -> str:
    if len(key) < MIN_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
        raise KeyFileError(
            f"{where}: a key must have at least {MIN_KEY_CHARS} characters, "
            "printable ASCII without spaces"
        )
    return key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
