"""Tool calls read out of text, in whatever pieces it comes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo.client.tool_calls import ToolCallReader, read_tool_calls

NAMES = ["weather", "now"]


def call(name: str, arguments: object) -> str:
    body = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{body}\n</tool_call>"


ROME = call("weather", {"city": 'R"o}m{e\\', "at": [{"h": 1}]})
NOW = call("now", {})
ANSWERS = [
    ("Hello", "Hello", []),
    ("", "", []),
    (ROME, "", ["weather"]),
    ("Let me see.\n" + ROME + "\n" + NOW + "\n", "Let me see.", ["weather", "now"]),
    (ROME + " and then", " and then", ["weather"]),
    ('{"name": "now", "parameters": {"a": {}}}', "", ["now"]),
    ('{"a": 1}', '{"a": 1}', []),
    ('{"name": "storm", "parameters": {}}', '{"name": "storm", "parameters": {}}', []),
    (call("storm", {}), call("storm", {}), []),
    ("a <tool_ca", "a <tool_ca", []),
    ("a <tool_call>", "a <tool_call>", []),
    ("a <b> </tool_call>\n\n", "a <b> </tool_call>\n\n", []),
]


@pytest.mark.parametrize(("text", "words", "names"), ANSWERS)
def test_a_whole_answer(text: str, words: str, names: list[str]) -> None:
    found, calls = read_tool_calls(text, NAMES)
    assert found == words
    assert [each.name for each in calls] == names
    assert all(isinstance(json.loads(each.arguments), dict) for each in calls)
    assert len({each.id for each in calls}) == len(calls)


@given(st.sampled_from(ANSWERS), st.lists(st.integers(0, 120), max_size=12))
@settings(deadline=None, derandomize=True)
def test_pieces_make_no_difference(answer: tuple[str, str, list[str]], cuts: list[int]) -> None:
    text, words, names = answer
    ends = [*sorted(cut for cut in cuts if cut < len(text)), len(text)]
    reader = ToolCallReader(NAMES)
    said, begin = [], 0
    for end in ends:
        said += reader.add(text[begin:end])
        begin = end
    said += reader.finish()
    assert "".join(each.text for each in said if each.call < 0) == words
    assert [each.begun[1] for each in said if each.begun is not None] == names
    whole = read_tool_calls(text, NAMES)[1]
    for number, expected in enumerate(whole):
        mine = "".join(each.text for each in said if each.call == number)
        assert mine == expected.arguments


def test_arguments_that_were_cut_off() -> None:
    words, (cut,) = read_tool_calls(ROME[:60], NAMES)
    assert words == ""
    assert cut.name == "weather" and cut.arguments.startswith('{"city": "R')
