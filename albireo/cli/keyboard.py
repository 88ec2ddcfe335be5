"""Keys of a terminal as they are pressed, without waiting for a line's end."""

from __future__ import annotations

import os
import select
import sys
import termios
import tty
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

_NAMES = {
    b"\x1b[A": "up", b"\x1bOA": "up", b"\x1b[B": "down", b"\x1bOB": "down",
    b"\x1b[5~": "page up", b"\x1b[6~": "page down", b"\x1b[H": "home", b"\x1b[F": "end",
    b"\x1b": "escape", b" ": "space",
}  # fmt: skip


class Keyboard:
    """`with Keyboard() as keys:` reads single keys; without a terminal there are none."""

    def __init__(self) -> None:
        self._terminal = sys.stdin.fileno() if sys.stdin.isatty() else -1
        self._before: list[Any] = []

    def __enter__(self) -> Self:
        if self._terminal >= 0:
            self._before = termios.tcgetattr(self._terminal)
            tty.setcbreak(self._terminal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._terminal >= 0:
            termios.tcsetattr(self._terminal, termios.TCSADRAIN, self._before)

    def wait(self, other: int, timeout_s: float | None = None) -> list[str]:
        """Keys by name, once there are some; none when `other` can be read, or the time is over."""
        sources = [other] if self._terminal < 0 else [other, self._terminal]
        ready, _, _ = select.select(sources, [], [], timeout_s)
        if self._terminal not in ready:
            return []
        data = os.read(self._terminal, 64)
        # A terminal that is gone reads as an end of file, for ever.
        return list(_keys(data)) if data else ["q"]


def _keys(data: bytes) -> Iterator[str]:
    while data:
        found = next((each for each in _NAMES if data.startswith(each) and each != b"\x1b"), None)
        if found is None and data[:1] == b"\x1b":
            # A key that has no name here is skipped whole.
            if len(data) == 1:
                yield "escape"
            return
        if found is None:
            found = data[:1]
        yield _NAMES.get(found, found.decode("latin-1"))
        data = data[len(found) :]
