"""Reads tool calls out of an answer's text, as it comes.

    hermes   <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>, as often as it comes
    llama    {"name": "f", "parameters": {...}} and nothing before it, once

Only the form of the model's style is read: it is the one that the node's grammar binds. The
grammar sees to it that a call that has begun is a valid one (but for where max_tokens or a stop
string cuts it off), so this only has to find where things begin and end.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable

import msgspec

from albireo.ipc.tools import CLOSE, HERMES, OPEN, ToolCall, call_head

_TEXT, _HEAD, _ARGUMENTS, _END = range(4)


class Said(msgspec.Struct, frozen=True):
    """A piece of an answer: text, or (call >= 0) the beginning of a call, or more arguments of it.

    call: its number.  begun: its id and name, in its first piece.
    """

    text: str
    call: int = -1
    begun: tuple[str, str] | None = None


class ToolCallReader:
    """Of one answer.

    names: of the functions that may be called.
    style: how the model calls them: Welcome.tool_style.
    """

    def __init__(self, names: Iterable[str], style: str) -> None:
        marked = style == HERMES
        lines = ("\n", "") if marked else ("",)
        self._open = OPEN if marked else ""
        self._heads = {line + call_head(name, style): name for name in names for line in lines}
        self._ends = [f"}}{line}{CLOSE if marked else ''}" for line in lines]
        self._buffer = ""
        self._state = _TEXT if marked else _HEAD
        self._dropped = ""
        self._behind_call = False
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
        if self._state == _HEAD:
            rest = self._dropped + self._open + rest
        elif self._state != _TEXT or (self._behind_call and not rest.strip()):
            return []
        return [Said(rest)] if rest else []

    def finish_reason(self, given: str) -> str:
        """Of the answer that is over: "tool_calls" in place of "stop" where all calls are whole.

        A stop string may have cut the last one off: nobody should run that.
        """
        whole = self.calls and self._state in (_TEXT, _END)
        return "tool_calls" if whole and given == "stop" else given

    def _step(self, said: list[Said]) -> bool:
        """One move; False when more text is needed."""
        if self._state == _TEXT:
            return self._read_text(said)
        if self._state == _HEAD:
            return self._read_head(said)
        if self._state == _ARGUMENTS:
            return self._read_arguments(said)
        return self._read_end()

    def _read_text(self, said: list[Said]) -> bool:
        """Up to the next call.  Blanks are no text where there is nothing else behind a call."""
        at = self._buffer.find(self._open) if self._open else -1
        sure = at if at >= 0 else len(self._buffer) - _held(self._buffer, self._open)
        before = self._buffer[:sure]
        blank = self._behind_call and not before.strip()
        if blank and at < 0:
            return False
        text = "" if blank else before.rstrip("\n")
        if text:
            said.append(Said(text))
            self._behind_call = False
        if at >= 0:
            self._dropped = before[len(text) :]
            self._state = _HEAD
            sure += len(self._open)
        self._buffer = self._buffer[sure:]
        return at >= 0

    def _read_head(self, said: list[Said]) -> bool:
        """Up to the arguments; what turns out to be no call is text, and what follows is read."""
        head = _leading(self._buffer, self._heads)
        if head is None:
            return False
        if head:
            begun = f"call_{secrets.token_hex(12)}", self._heads[head]
            said.append(Said("", self.calls, begun))
            self.calls += 1
            self._buffer = self._buffer[len(head) :]
            self._depth, self._in_string, self._escaped = 0, False, False
            self._state = _ARGUMENTS
            return True
        if text := self._dropped + self._open:
            said.append(Said(text))
        self._behind_call = False
        self._state = _TEXT
        return True

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
                if self._depth <= 0:
                    # Below 0 it is the call's own brace, behind a value without any.
                    end = at + 1 + self._depth
                    said.append(Said(text[:end], self.calls - 1))
                    self._buffer = text[end:]
                    self._state = _END
                    return True
        if text:
            said.append(Said(text, self.calls - 1))
        self._buffer = ""
        return False

    def _read_end(self) -> bool:
        """The call's own brace, and the mark behind it; what is neither is text again."""
        end = _leading(self._buffer, self._ends)
        if end is None:
            return False
        self._buffer = self._buffer[len(end) :]
        self._behind_call = True
        self._state = _TEXT
        return True


def read_tool_calls(
    text: str, reason: str, names: Iterable[str], style: str
) -> tuple[str, list[ToolCall], str]:
    """Of a whole answer: its text without the calls, these, and why it ended.

    reason: why it ended, as the node says it.
    """
    reader = ToolCallReader(names, style)
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
    return "".join(words), calls, reader.finish_reason(reason)


def _leading(text: str, choices: Iterable[str]) -> str | None:
    """The one that a text begins with; "": with none of them.  None: more text has to tell."""
    for choice in choices:
        if text.startswith(choice):
            return choice
    return None if any(choice.startswith(text) for choice in choices) else ""


def _held(text: str, mark: str) -> int:
    """Characters at the end of a text with which a mark may begin, line ends before it included."""
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[-size:]):
            return size + _line_ends(text[:-size])
    return _line_ends(text)


def _line_ends(text: str) -> int:
    return len(text) - len(text.rstrip("\n"))
