"""The grammar of tools: which answers each choice leaves, in both forms."""

from __future__ import annotations

import json
from typing import Any

import pytest

from albireo.client.tool_calls import read_tool_calls
from albireo.ipc.tools import HERMES, LLAMA, Tool, Tools, call_head
from albireo.workers.grammar.compile import GrammarCompiler, GrammarError
from albireo.workers.tokenizer.tool_prompt import tool_style

from .model import encode, vocabulary

WEATHER = Tool(
    name="weather",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
)
FUNCTIONS = (WEATHER, Tool(name="now"))
ROME = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
LLAMA_CALL = '{"name": "weather", "parameters": {"city": "Rome"}}'
TEXTS = {
    "text": "Hello", "rome": ROME, "now": NOW, "text, rome": "Let me see.\n" + ROME,
    "rome, now": ROME + "\n" + NOW, "wrong": ROME.replace("city", "town"),
    "unknown": ROME.replace("weather", "storm"), "llama": LLAMA_CALL, "empty": "",
    "llama wrong": LLAMA_CALL.replace("city", "town"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("style", "asked", "possible"),
    [
        ("hermes", {}, {"text", "rome", "now", "text, rome", "rome, now", "llama", "empty",
                        "llama wrong"}),
        ("hermes", {"parallel": False}, {"text", "rome", "now", "text, rome", "llama", "empty",
                                         "llama wrong"}),
        ("hermes", {"choice": "required"}, {"rome", "now", "rome, now"}),
        ("hermes", {"choice": "required", "parallel": False}, {"rome", "now"}),
        ("hermes", {"name": "now"}, {"now"}),
        ("llama", {}, set(TEXTS) - {"llama wrong"}),
        ("llama", {"choice": "required"}, {"llama"}),
        ("llama", {"name": "now"}, set()),
    ],
)  # fmt: skip
def test_choices(style: str, asked: dict[str, Any], possible: set[str]) -> None:
    tools = Tools(functions=FUNCTIONS, **asked)
    grammar = GrammarCompiler(vocabulary()).compile_tools(tools, style)
    assert {name for name, text in TEXTS.items() if accepts(grammar, text)} == possible


def accepts(grammar: str, text: str) -> bool:
    matcher = vocabulary().matcher(grammar)
    tokens = encode(text)
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


@pytest.mark.parametrize("style", [HERMES, LLAMA])
def test_what_the_grammar_does_not_bind_is_read_as_text(style: str) -> None:
    tools = Tools(functions=FUNCTIONS)
    grammar = GrammarCompiler(vocabulary()).compile_tools(tools, style)
    typed = LLAMA_CALL.replace("parameters", "arguments")
    wrong = [text.replace("city", "town") for text in (ROME, LLAMA_CALL, typed)]
    texts = [before + text for before in ("", " ", "\n", "{} ") for text in wrong]
    passed = [text for text in texts if accepts(grammar, text)]
    assert passed
    for text in passed:
        assert read_tool_calls(text, "stop", ["weather", "now"], style) == (text, [], "stop")


@pytest.mark.parametrize(("style", "text"), [(HERMES, ROME + "\n" + NOW), (LLAMA, LLAMA_CALL)])
def test_what_the_grammar_binds_is_read_as_calls(style: str, text: str) -> None:
    tools = Tools(functions=FUNCTIONS, choice="required")
    assert accepts(GrammarCompiler(vocabulary()).compile_tools(tools, style), text)
    words, calls, _ = read_tool_calls(text, "stop", ["weather", "now"], style)
    assert words == "" and json.loads(calls[0].arguments) == {"city": "Rome"}
    assert [call.name for call in calls] == ["weather", "now"][: len(calls)]


@pytest.mark.parametrize("style", [HERMES, LLAMA])
def test_arguments_are_an_object_also_where_the_schema_leaves_it_out(style: str) -> None:
    untyped = Tool(name="f", parameters={"properties": {"city": {"type": "string"}}})
    tools = Tools(functions=(untyped,), choice="required")
    grammar = GrammarCompiler(vocabulary()).compile_tools(tools, style)
    end = "}\n</tool_call>" if style == HERMES else "}"
    head = ("<tool_call>\n" if style == HERMES else "") + call_head("f", style)
    values = ["{}", '{"city": "Rome"}', "5", '"x"', "null", "[]", '{"city": 5}']
    assert [each for each in values if accepts(grammar, head + each + end)] == values[:2]


def test_cases_of_parameters_that_overlap_are_taken_as_any_of_them_where_asked() -> None:
    cases = {"oneOf": [{"type": "integer"}, {"type": "number"}]}
    parameters: dict[str, Any] = {"properties": {"n": cases}}

    def compiled() -> str:
        tools = Tools(functions=(Tool(name="f", parameters=parameters),))
        return GrammarCompiler(vocabulary()).compile_tools(tools, HERMES)

    with pytest.raises(GrammarError, match="at the schema's top"):
        compiled()
    parameters["x-guidance"] = {"coerce_one_of": True}
    assert compiled()


def test_parameters_that_are_no_schema_are_the_tools_fault() -> None:
    tools = Tools(functions=(Tool(name="f", parameters={"type": "nope"}),))
    with pytest.raises(GrammarError, match="nope") as caught:
        GrammarCompiler(vocabulary()).compile_tools(tools, "hermes")
    assert caught.value.param == "tools"


@pytest.mark.parametrize(
    ("functions", "asked", "said"),
    [
        ((), {}, "1 to 128 functions"),
        ((Tool(name="a b"),), {}, "unlike 'a b'"),
        ((Tool(name="a"), Tool(name="a")), {}, "the same name"),
        ((Tool(name="a"),), {"name": "b"}, "no function 'b' among a"),
        ((Tool(name="a", parameters={"type": "array"}),), {}, "of 'a' are of type 'array'"),
        ((Tool(name="a", parameters={"type": ["object", "null"]}),), {}, "type ['object', 'null']"),
    ],
)
def test_what_is_wrong_with_tools(
    functions: tuple[Tool, ...], asked: dict[str, Any], said: str
) -> None:
    fault = Tools(functions=functions, **asked).fault()
    assert fault is not None and said in fault


def test_styles_of_templates() -> None:
    assert tool_style("{% if tools %}<tool_call>{% endif %}") == "hermes"
    assert tool_style('{{ tools }} {"name": f, "parameters": x}') == "llama"
    assert tool_style("{{ messages }}") == "hermes"
