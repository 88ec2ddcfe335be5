"""Functions that a model may call, and its calls: part of a conversation."""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

MAX_TOOLS = 128
HERMES, LLAMA = "hermes", "llama"
"""Forms of calls in an answer's text: marked, anywhere in it; or bare, and nothing else."""
OPEN, CLOSE = "<tool_call>", "</tool_call>"
"""Around each call in the form HERMES."""
_ARGUMENTS = {HERMES: "arguments", LLAMA: "parameters"}
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


def call_head(name: str, style: str) -> str:
    """What a call begins with; its arguments follow, and a brace."""
    return f'{{"name": "{name}", "{_ARGUMENTS[style]}": '


class Tool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A function.  parameters: JSON schema of its arguments, an object; None = it has none."""

    name: str
    description: str = ""
    parameters: dict[str, Any] | None = None


class Tools(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be called, and whether it has to be.

    choice: "none"; "auto", the model decides; "required", one call at least.
    name: the function that has to be called, instead of `choice`.
    parallel: several calls in one answer are possible.
    """

    functions: tuple[Tool, ...]
    choice: Literal["none", "auto", "required"] = "auto"
    name: str | None = None
    parallel: bool = True

    def fault(self) -> str | None:
        """What is wrong with it, as far as that can be said without compiling it."""
        if not 1 <= len(self.functions) <= MAX_TOOLS:
            return f"1 to {MAX_TOOLS} functions can be given, not {len(self.functions)}"
        names = [each.name for each in self.functions]
        for name in names:
            if not _NAME.fullmatch(name):
                return (
                    f"the name of a function has 1 to 64 letters, digits, '_', '-' and '.', "
                    f"unlike {name[:80]!r}"
                )
        if len(set(names)) < len(names):
            return "two functions have the same name"
        for each in self.functions:
            kind = (each.parameters or {}).get("type", "object")
            if kind != "object":
                return (
                    f"the parameters of {each.name!r} are of type {repr(kind)[:80]}, but arguments "
                    'are an object: say "type": "object", with a property for each of them'
                )
        if self.name is not None and self.name not in names:
            return f"there is no function {self.name[:80]!r} among {', '.join(names)[:200]}"
        return None

    @property
    def bind(self) -> bool:
        """Whether the answer is bound by them."""
        return self.choice != "none" or self.name is not None


class ToolCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A call in an answer.  arguments: JSON text; cut off where the answer was."""

    id: str
    name: str
    arguments: str
