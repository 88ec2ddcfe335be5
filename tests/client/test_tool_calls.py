"""Tool calls read out of text, in whatever pieces it comes."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from albireo.client.tool_calls import Said, ToolCallReader, read_tool_calls
from albireo.ipc.tools import HERMES, LLAMA

NAMES = ["weather", "now"]


def call(name: str, arguments: object) -> str:
    body = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{body}\n</tool_call>"


def bare(name: str, arguments: object) -> str:
    return json.dumps({"name": name, "parameters": arguments})


ROME = call("weather", {"city": 'R"o}m{e\\', "at": [{"h": 1}]})
NOW = call("now", {})
NESTED = bare("now", {"a": {}})
TYPED = '{"name": "now", "arguments": {}}'
ANSWERS = [
    (HERMES, "Hello", "Hello", []),
    (HERMES, "", "", []),
    (HERMES, ROME, "", ["weather"]),
    (HERMES, "Let me see.\n" + ROME + "\n" + NOW + "\n", "Let me see.", ["weather", "now"]),
    (HERMES, ROME + " and then\n", " and then\n", ["weather"]),
    (HERMES, ROME + "\nif x:\n   y \n" + NOW, "\nif x:\n   y ", ["weather", "now"]),
    (HERMES, '{"a": 1}\n' + NOW, '{"a": 1}', ["now"]),
    (HERMES, '{"plan": "' + 200 * "x" + '"}' + NOW, '{"plan": "' + 200 * "x" + '"}', ["now"]),
    (HERMES, TYPED, TYPED, []),
    (HERMES, NESTED, NESTED, []),
    (HERMES, call("storm", {}) + NOW, call("storm", {}), ["now"]),
    (HERMES, NOW + "\n\n" + call("storm", {}), "\n\n" + call("storm", {}), ["now"]),
    (HERMES, NOW.replace("}}", '}, "a": 1}') + " b", ', "a": 1}\n</tool_call> b', ["now"]),
    (HERMES, "a <tool_ca", "a <tool_ca", []),
    (HERMES, "a <tool_call>", "a <tool_call>", []),
    (HERMES, "a <b> </tool_call>\n\n", "a <b> </tool_call>\n\n", []),
    (LLAMA, NESTED, "", ["now"]),
    (LLAMA, "", "", []),
    (LLAMA, " \n" + NESTED, " \n" + NESTED, []),
    (LLAMA, ROME, ROME, []),
    (LLAMA, TYPED, TYPED, []),
    (LLAMA, '{"a": 1}', '{"a": 1}', []),
    (LLAMA, '{"name": "wea', '{"name": "wea', []),
    (LLAMA, bare("storm", {}), bare("storm", {}), []),
    (LLAMA, bare("now", {})[:-1] + ', "a": 1} b', ', "a": 1} b', ["now"]),
]  # fmt: skip


@pytest.mark.parametrize(("style", "text", "words", "names"), ANSWERS)
def test_a_whole_answer(style: str, text: str, words: str, names: list[str]) -> None:
    found, calls = read_tool_calls(text, NAMES, style)
    assert found == words
    assert [each.name for each in calls] == names
    assert all(isinstance(json.loads(each.arguments), dict) for each in calls)
    assert len({each.id for each in calls}) == len(calls)


def added_up(said: list[Said]) -> tuple[str, list[tuple[str, str]]]:
    """Text, and each call's name with its arguments."""
    calls: list[tuple[str, str]] = []
    for each in said:
        if each.begun is not None:
            calls.append((each.begun[1], ""))
        elif each.call >= 0:
            name, arguments = calls[each.call]
            calls[each.call] = name, arguments + each.text
    return "".join(each.text for each in said if each.call < 0), calls


FRAGMENTS = [
    ROME, NOW, NESTED, TYPED, call("storm", {}), call("now", 5), bare("now", "a}"), "<tool_call>",
    "</tool_call>", "<tool_", "\n", " ", "a", "}", "{", '"', '{"name": "now", ',
]  # fmt: skip


@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join),
    st.sampled_from([HERMES, LLAMA]),
    st.lists(st.integers(1, 12), min_size=1, max_size=8),
)
@example(NOW + "\nif x:\n    y", HERMES, [1])
@example('{"plan": 1}\n' + NOW, HERMES, [4])
@settings(deadline=None, derandomize=True)
def test_pieces_make_no_difference(text: str, style: str, sizes: list[int]) -> None:
    reader = ToolCallReader(NAMES, style)
    said, at = [], 0
    while at < len(text):
        size = sizes[len(said) % len(sizes)]
        said += reader.add(text[at : at + size])
        at += size
    said += reader.finish()
    words, calls = read_tool_calls(text, NAMES, style)
    assert added_up(said) == (words, [(each.name, each.arguments) for each in calls])


@pytest.mark.parametrize("value", ["5", "null", '"a}"', "[]"])
def test_arguments_that_are_no_object_end_as_well(value: str) -> None:
    strange = NOW.replace("{}", value)
    words, calls = read_tool_calls(strange + "\n" + ROME, NAMES, HERMES)
    assert words == ""
    assert [(each.name, each.arguments) for each in calls[:1]] == [("now", value)]
    assert [each.name for each in calls[1:]] == ["weather"]


def test_arguments_that_were_cut_off() -> None:
    words, (cut,) = read_tool_calls(ROME[:60], NAMES, HERMES)
    assert words == ""
    assert cut.name == "weather" and cut.arguments.startswith('{"city": "R')
