"""How the chat template is to turn a conversation into a prompt."""

from __future__ import annotations

from typing import Any

import msgspec

MAX_VARIABLES = 64
RESERVED = (
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
    "chat_template", "tokenize",
)  # fmt: skip
"""Names that a request has other fields for, or that are nobody's to set."""


class TemplateOptions(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """variables: for the template, such as Qwen3's {"enable_thinking": False}; it does with them
        what it likes, and nothing with those it does not know.
    add_generation_prompt: the prompt ends with the beginning of an answer; None = it does, unless
        the last message is continued.
    continue_final_message: it ends within the last message, which the answer goes on with.
    """

    variables: dict[str, Any] = {}
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False

    @property
    def begins_answer(self) -> bool:
        """add_generation_prompt, decided."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt

    def fault(self) -> str | None:
        """What is wrong with it, whatever the template is."""
        if self.continue_final_message and self.begins_answer:
            return (
                "an answer either goes on with the last message or begins a new one: give one of "
                "continue_final_message and add_generation_prompt"
            )
        if len(self.variables) > MAX_VARIABLES:
            return (
                f"at most {MAX_VARIABLES} variables can be given to the template, not "
                f"{len(self.variables)}"
            )
        for name in self.variables:
            if name in RESERVED:
                return f"{name!r} is no variable that can be given to the template"
        return None


PLAIN = TemplateOptions()
