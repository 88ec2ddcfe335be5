"""From response_format, guided_* and structured_outputs to a Grammar."""

from __future__ import annotations

from typing import Any

from albireo.ipc.grammars import Grammar

from .errors import invalid
from .requests import ChatRequest, CompletionRequest, ResponseFormat

_GUIDED = (
    ("guided_json", "json_schema"),
    ("guided_regex", "regex"),
    ("guided_choice", "choice"),
    ("guided_grammar", "lark"),
)


def grammar_of(asked: CompletionRequest | ChatRequest) -> Grammar | None:
    """None: free text.  Raises HttpError (400)."""
    return next(iter(_grammars(asked).values()), None)


def grammar_name(asked: CompletionRequest | ChatRequest) -> str:
    """The field that asks for the grammar of a request which has been checked."""
    return next(iter(_grammars(asked)), "response_format")


def _grammars(asked: CompletionRequest | ChatRequest) -> dict[str, Grammar]:
    named: dict[str, Grammar] = {}
    if asked.response_format is not None:
        grammar = _of_format(asked.response_format)
        if grammar is not None:
            named["response_format"] = grammar
    for name, field in _GUIDED:
        value = getattr(asked, name)
        if value is not None:
            named[name] = _checked(name, {field: value})
    if asked.structured_outputs is not None:
        outputs = asked.structured_outputs
        fields: dict[str, Any] = {
            "json_schema": outputs.json, "regex": outputs.regex, "lark": outputs.grammar,
            "choice": outputs.choice, "json_object": outputs.json_object,
        }  # fmt: skip
        fields = {field: value for field, value in fields.items() if value is not None}
        named["structured_outputs"] = _checked("structured_outputs", fields)
    if len(named) > 1:
        raise invalid(f"{' and '.join(named)} cannot both hold: give one", list(named)[1])
    return named


def _of_format(asked: ResponseFormat) -> Grammar | None:
    if asked.type == "text":
        return None
    if asked.type == "json_object":
        return Grammar(json_object=True)
    if asked.json_schema is None or asked.json_schema.schema is None:
        raise invalid(
            "response_format of type json_schema needs json_schema with a schema in it",
            "response_format.json_schema",
        )
    return Grammar(json_schema=asked.json_schema.schema)


def _checked(name: str, fields: dict[str, Any]) -> Grammar:
    if "choice" in fields:
        fields["choice"] = tuple(fields["choice"])
    grammar = Grammar(**fields)
    fault = grammar.fault()
    if fault is not None:
        raise invalid(f"{name}: {fault}", name)
    return grammar
