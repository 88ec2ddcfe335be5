"""What an answer has to look like: the typed form of structured output.

A client says it, the tokenizer process turns it into the text that the matchers
are made of (workers/grammar/), and that text travels with the request.
"""

from __future__ import annotations

from typing import Any

import msgspec

MAX_GRAMMAR_BYTES = 64 * 1024
"""Of a grammar as a client gives it, and as matchers are made of it."""
MAX_CHOICES_OF_TEXT = 4096


class Grammar(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Exactly one of these holds for the whole answer.

    json_schema: JSON of this schema, which is a map, or its JSON text.
    json_object: a JSON object, whatever is in it.
    regex: a match of this regular expression (Rust's syntax, without anchors).
    choice: one of these texts.
    lark: a sentence of this grammar, in llguidance's Lark, or in GBNF.

    JSON has at most one space behind each colon and comma, and no other between its tokens.
    """

    json_schema: dict[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] = ()
    lark: str | None = None

    def fault(self) -> str | None:
        """What is wrong with it, as far as that can be said without compiling it."""
        given = [name for name in self.__struct_fields__ if getattr(self, name) not in (None, ())]
        given = [name for name in given if name != "json_object" or self.json_object]
        if len(given) != 1:
            named = ", ".join(given) or "none"
            return f"give exactly one of json_schema, json_object, regex, choice, lark; not {named}"
        if len(self.choice) > MAX_CHOICES_OF_TEXT:
            return f"at most {MAX_CHOICES_OF_TEXT} choices are possible, not {len(self.choice)}"
        if "" in self.choice or self.regex == "" or self.lark == "":
            return f"{given[0]} holds an empty text"
        return None
