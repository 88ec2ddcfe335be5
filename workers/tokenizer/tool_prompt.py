"""Tools in conversations: as templates want them, and for templates that know nothing of them.

A template that makes nothing of `tools` gets the tools in the system message, in the Hermes form
that most open models have seen, and calls and their results as text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from albireo.ipc.protocol import ChatMessage
from albireo.ipc.tools import HERMES, LLAMA, Tool, ToolCall

_json = partial(json.dumps, ensure_ascii=False)
"""As templates write it."""

_PROMPT = """{system}# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{functions}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def tool_style(template: str) -> str:
    """In which form the template teaches calls (workers/grammar/tools.py)."""
    teaches = "tools" in template and '"parameters"' in template and '"name"' in template
    return LLAMA if teaches and "<tool_call>" not in template else HERMES


def described(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """As templates and models know functions from OpenAI."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters or {"type": "object", "properties": {}},
            },
        }
        for tool in tools
    ]


def as_maps(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages for a template that knows tools."""
    return [_map(message) for message in messages]


def as_text(messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Messages for a template that does not: tools, calls and results are written out."""
    maps = list(_turns(messages))
    if tools:
        system = ""
        if maps and maps[0]["role"] == "system":
            system = maps.pop(0)["content"] + "\n\n"
        functions = "\n".join(map(_json, described(tools)))
        prompt = _PROMPT.format(system=system, functions=functions)
        maps.insert(0, {"role": "system", "content": prompt})
    return maps


def _map(message: ChatMessage) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        found["tool_call_id"] = message.tool_call_id
    if message.name:
        found["name"] = message.name
    return found


def _turns(messages: Sequence[ChatMessage]) -> Iterator[dict[str, Any]]:
    """Results are the user's; with what stands beside them they are one turn.

    Templates that know no tools often want roles to alternate.
    """
    for role, group in groupby(messages, lambda each: "user" if each.role == "tool" else each.role):
        run = list(group)
        contents = [_written(message) for message in run]
        if any(message.role == "tool" for message in run):
            contents = ["\n".join(contents)]
        for content in contents:
            yield {"role": role, "content": content}


def _written(message: ChatMessage) -> str:
    content = message.content
    for call in message.tool_calls:
        body = _json({"name": call.name, "arguments": _arguments(call)})
        content += f"{chr(10) if content else ''}<tool_call>\n{body}\n</tool_call>"
    return f"<tool_response>\n{content}\n</tool_response>" if message.role == "tool" else content


def _arguments(call: ToolCall) -> Any:
    """Templates write maps as JSON; what is none stays text."""
    try:
        found = json.loads(call.arguments)
    except ValueError:
        return call.arguments
    return found if isinstance(found, dict) else call.arguments
