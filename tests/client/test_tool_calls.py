"""Tool calls read out of text, in whatever pieces it comes."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from albireo.client.results import Choice, Completion, Usage, with_tool_calls
from albireo.client.tool_calls import Said, ToolCallReader, read_tool_calls
from albireo.ipc.tools import HERMES, LLAMA, Tool, Tools

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
    found, calls, reason = read_tool_calls(text, "stop", NAMES, style)
    assert found == words
    assert reason == ("tool_calls" if calls else "stop")
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
    words, calls, reason = read_tool_calls(text, "stop", NAMES, style)
    assert reader.finish_reason("stop") == reason
    assert added_up(said) == (words, [(each.name, each.arguments) for each in calls])


@pytest.mark.parametrize("value", ["5", "null", '"a}"', "[]"])
def test_arguments_that_are_no_object_end_as_well(value: str) -> None:
    strange = NOW.replace("{}", value)
    words, calls, _ = read_tool_calls(strange + "\n" + ROME, "stop", NAMES, HERMES)
    assert words == ""
    assert [(each.name, each.arguments) for each in calls[:1]] == [("now", value)]
    assert [each.name for each in calls[1:]] == ["weather"]


def test_arguments_that_were_cut_off() -> None:
    words, (cut,), _ = read_tool_calls(ROME[:60], "length", NAMES, HERMES)
    assert words == ""
    assert cut.name == "weather" and cut.arguments.startswith('{"city": "R')


@pytest.mark.parametrize(
    ("style", "text", "calls", "reason"),
    [
        (HERMES, ROME[:60], 1, "stop"),
        (HERMES, NOW + "\n" + ROME[:60], 2, "stop"),
        (HERMES, NOW + "\n" + ROME[:20], 1, "stop"),
        (HERMES, NOW.removesuffix("}\n</tool_call>"), 1, "tool_calls"),
        (HERMES, NOW.removesuffix("</tool_call>"), 1, "tool_calls"),
        (HERMES, NOW + "\nand <", 1, "tool_calls"),
        (LLAMA, NESTED[:-2], 1, "stop"),
        (LLAMA, NESTED[:-1], 1, "tool_calls"),
    ],
)
def test_only_whole_calls_are_why_an_answer_ended(
    style: str, text: str, calls: int, reason: str
) -> None:
    """A stop string may cut a call off, as max_tokens may: nobody should run that."""
    _, found, why = read_tool_calls(text, "stop", NAMES, style)
    assert (len(found), why) == (calls, reason)
    assert read_tool_calls(text, "length", NAMES, style)[2] == "length"


def test_a_whole_answer_of_the_library_ends_for_the_same_reason() -> None:
    tools = Tools(functions=tuple(Tool(name=name) for name in NAMES))
    for text, reason in ((ROME[:60], "stop"), (ROME, "tool_calls")):
        choice = Choice(text, [1], "stop", None)
        answer = Completion(text, [1], "stop", None, Usage(1, 1), choices=[choice])
        read = with_tool_calls(answer, tools, HERMES)
        assert [each.name for each in read.tool_calls] == ["weather"]
        assert (read.finish_reason, read.choices[0].finish_reason) == (reason, reason)
