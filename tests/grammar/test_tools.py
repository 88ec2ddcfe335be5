"""The grammar of tools: which answers each choice leaves, in both forms."""

from __future__ import annotations

from typing import Any

import pytest

from albireo.ipc.tools import Tool, Tools
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
LLAMA = '{"name": "weather", "parameters": {"city": "Rome"}}'
TEXTS = {
    "text": "Hello", "rome": ROME, "now": NOW, "text, rome": "Let me see.\n" + ROME,
    "rome, now": ROME + "\n" + NOW, "wrong": ROME.replace("city", "town"),
    "unknown": ROME.replace("weather", "storm"), "llama": LLAMA, "empty": "",
    "llama wrong": LLAMA.replace("city", "town"),
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
    found = set()
    for name, text in TEXTS.items():
        matcher = vocabulary().matcher(grammar)
        tokens = encode(text)
        if matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting():
            found.add(name)
    assert found == possible


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
