"""Conversations with tools, for templates that know nothing of them."""

from __future__ import annotations

import pytest

from albireo.ipc.protocol import ChatMessage
from albireo.ipc.tools import Tool, ToolCall, Tools
from albireo.workers.tokenizer.tool_prompt import as_text

from .test_chat_template import CHATML, GEMMA
from .tiny_tokenizers import byte_level, text_model

PHI4_MINI = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}"
    "<|system|>{{ message['content'] }}<|tool|>{{ message['tools'] }}<|/tool|><|end|>"
    "{% else %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "<|assistant|>"
)
"""In the manner of its own: tools are looked for in the system message."""
ASK = ChatMessage(role="user", content="Rome and Paris?")
CALLS = ChatMessage(
    role="assistant",
    content="",
    tool_calls=tuple(ToolCall(id=f"c{i}", name="weather", arguments="{}") for i in range(2)),
)
ROME = ChatMessage(role="tool", content="18", tool_call_id="c0")
PARIS = ChatMessage(role="tool", content="12", tool_call_id="c1")
MORE = ChatMessage(role="user", content="In Fahrenheit.")
ROME_TEXT = "<tool_response>\n18\n</tool_response>"
PARIS_TEXT = "<tool_response>\n12\n</tool_response>"


def turns(*messages: ChatMessage) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in as_text(messages, ())]


def test_results_and_what_stands_beside_them_are_one_turn() -> None:
    ask, calls = turns(ASK, CALLS)
    both = f"{ROME_TEXT}\n{PARIS_TEXT}"
    assert turns(ASK, CALLS, ROME) == [ask, calls, ("user", ROME_TEXT)]
    assert turns(ASK, CALLS, ROME, PARIS) == [ask, calls, ("user", both)]
    assert turns(CALLS, ROME, PARIS, MORE) == [calls, ("user", f"{both}\nIn Fahrenheit.")]
    assert turns(CALLS, ROME, CALLS, PARIS) == [
        calls, ("user", ROME_TEXT), calls, ("user", PARIS_TEXT),
    ]  # fmt: skip
    assert turns(ASK, MORE) == [ask, ("user", "In Fahrenheit.")], "theirs are left alone"


@pytest.mark.parametrize("template", [GEMMA, CHATML], ids=["gemma", "chatml"])
def test_parallel_calls_can_be_continued(template: str) -> None:
    model = text_model(byte_level(), named_tokens={"bos_token": "<s>"}, chat_template=template)
    tools = Tools(functions=(Tool(name="weather"),))
    rendered = model.render_chat([ASK, CALLS, ROME, PARIS], tools)
    assert f"user\n{ROME_TEXT}\n{PARIS_TEXT}<" in rendered


def test_a_template_with_the_word_alone_knows_nothing_of_tools() -> None:
    model = text_model(byte_level(), chat_template=PHI4_MINI)
    rendered = model.render_chat([ASK, CALLS, ROME], Tools(functions=(Tool(name="weather"),)))
    assert rendered.startswith("<|system|># Tools")
    assert '"name": "weather"' in rendered
    assert "<|tool|>" not in rendered
    assert f"<|user|>{ROME_TEXT}<|end|><|assistant|>" in rendered


def test_what_is_not_ascii_is_written_as_it_is() -> None:
    model = text_model(byte_level(), chat_template=CHATML)
    tool = Tool(name="weather", description="Погода", parameters={"title": "市"})
    call = ToolCall(id="c0", name="weather", arguments='{"市": "ローマ"}')
    asked = ChatMessage(role="assistant", content="", tool_calls=(call,))
    rendered = model.render_chat([ASK, asked, ROME], Tools(functions=(tool,)))
    assert '"name": "weather", "description": "Погода", "parameters": {"title": "市"}' in rendered
    assert '{"name": "weather", "arguments": {"市": "ローマ"}}' in rendered
