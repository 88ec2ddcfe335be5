"""Reads tool calls out of an answer's text, as it comes.

    <tool_call>{"name": "f", "arguments": {...}}</tool_call>   anywhere, as often as it comes
    {"name": "f", "parameters": {...}}                         at the beginning, alone

The node's grammar sees to it that a call that has begun is a valid one (but for where max_tokens
cuts it off), so this only has to find where things begin and end.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable

import msgspec

from albireo.ipc.tools import ToolCall

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\S)')
_CALL_END = re.compile(r"\s*\}\s*")
_MAX_HEAD_CHARS = 160
_TEXT, _NAMED, _ARGUMENTS, _AFTER = range(4)


class Said(msgspec.Struct, frozen=True):
    """A piece of an answer: text, or (call >= 0) the beginning of a call, or more arguments of it.

    call: its number.  begun: its id and name, in its first piece.
    """

    text: str
    call: int = -1
    begun: tuple[str, str] | None = None


class ToolCallReader:
    """Of one answer.  names: of the functions that may be called."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._buffer = ""
        self._state = _TEXT
        self._bare = False
        self._dropped = ""
        self._at_start = True
        self._depth = 0
        self._in_string = self._escaped = False
        self.calls = 0

    def add(self, text: str) -> list[Said]:
        """What is certain with more text."""
        self._buffer += text
        said: list[Said] = []
        while self._step(said):
            pass
        return said

    def finish(self) -> list[Said]:
        """The answer is over: what was held back was no call."""
        rest, self._buffer = self._buffer, ""
        if self._state in (_ARGUMENTS, _AFTER):
            return []
        if self._state == _NAMED and not self._bare:
            rest = self._dropped + _OPEN + rest
        return [Said(rest)] if rest and (rest.strip() or not self.calls) else []

    def _step(self, said: list[Said]) -> bool:
        """One move; False when more text is needed."""
        if self._state == _TEXT:
            return self._read_text(said)
        if self._state == _NAMED:
            return self._read_head(said)
        if self._state == _ARGUMENTS:
            return self._read_arguments(said)
        return self._read_end()

    def _read_text(self, said: list[Said]) -> bool:
        if self._at_start:
            begun = self._buffer.lstrip()
            if not begun:
                return False
            self._at_start = False
            if begun[0] == "{":
                self._state, self._bare = _NAMED, True
                return True
        at = self._buffer.find(_OPEN)
        sure = at if at >= 0 else len(self._buffer) - _held(self._buffer)
        text = self._buffer[:sure]
        if at >= 0:
            whole, text = text, text.rstrip("\n")
            self._dropped = whole[len(text) :]
            self._state, self._bare = _NAMED, False
            sure += len(_OPEN)
        if text and (text.strip() or not self.calls):
            said.append(Said(text))
        self._buffer = self._buffer[sure:]
        return at >= 0

    def _read_head(self, said: list[Said]) -> bool:
        head = _HEAD.match(self._buffer)
        if head is not None and head[1] in self._names:
            begun = f"call_{secrets.token_hex(12)}", head[1]
            said.append(Said("", self.calls, begun))
            self.calls += 1
            self._buffer = self._buffer[head.end() :]
            self._depth, self._in_string, self._escaped = 0, False, False
            self._state = _ARGUMENTS
            return True
        if head is None and len(self._buffer) <= _MAX_HEAD_CHARS:
            return False
        head_text = self._buffer if self._bare else self._dropped + _OPEN + self._buffer
        said.append(Said(head_text))
        self._buffer = ""
        self._state = _TEXT
        return False

    def _read_arguments(self, said: list[Said]) -> bool:
        """Up to where the JSON value closes."""
        text = self._buffer
        for at, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    said.append(Said(text[: at + 1], self.calls - 1))
                    self._buffer = text[at + 1 :]
                    self._state = _AFTER
                    return True
        if text:
            said.append(Said(text, self.calls - 1))
        self._buffer = ""
        return False

    def _read_end(self) -> bool:
        """The call's own brace, and the mark behind it."""
        end = _CALL_END.match(self._buffer)
        if end is None:
            return False
        at = end.end()
        if not self._bare:
            if not self._buffer.startswith(_CLOSE, at):
                return False
            at += len(_CLOSE)
        self._buffer = self._buffer[at:]
        self._state = _TEXT
        return True


def read_tool_calls(text: str, names: Iterable[str]) -> tuple[str, list[ToolCall]]:
    """Of a whole answer: its text without the calls, and these."""
    reader = ToolCallReader(names)
    words: list[str] = []
    begun: list[tuple[str, str]] = []
    arguments: list[str] = []
    for said in [*reader.add(text), *reader.finish()]:
        if said.call < 0:
            words.append(said.text)
        elif said.begun is not None:
            begun.append(said.begun)
            arguments.append("")
        else:
            arguments[said.call] += said.text
    calls = [
        ToolCall(id=number, name=name, arguments=each)
        for (number, name), each in zip(begun, arguments, strict=True)
    ]
    return "".join(words), calls


def _held(text: str) -> int:
    """Characters at the end of a text with which a call may begin, line ends before it included."""
    for size in range(min(len(_OPEN) - 1, len(text)), 0, -1):
        if _OPEN.startswith(text[-size:]):
            return size + _line_ends(text[:-size])
    return _line_ends(text)


def _line_ends(text: str) -> int:
    return len(text) - len(text.rstrip("\n"))
