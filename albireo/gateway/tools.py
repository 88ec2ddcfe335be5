"""From `tools`, `tool_choice` and `parallel_tool_calls` to what the node is asked."""

from __future__ import annotations

from albireo.ipc.tools import Tool, Tools

from .errors import invalid
from .requests import ChatRequest, ToolChoice


def tools_of(asked: ChatRequest) -> Tools | None:
    """None: there are none.  Raises HttpError (400)."""
    choice = asked.tool_choice
    if not asked.tools:
        if choice is not None and choice not in ("none", "auto"):
            raise invalid("tool_choice asks for a call, but there are no tools", "tool_choice")
        return None
    functions = tuple(
        Tool(
            name=each.function.name,
            description=each.function.description or "",
            parameters=each.function.parameters,
        )
        for each in asked.tools
    )
    name = choice.function.name if isinstance(choice, ToolChoice) else None
    tools = Tools(
        functions=functions,
        choice=choice if isinstance(choice, str) else "auto",
        name=name,
        parallel=asked.parallel_tool_calls is not False,
    )
    fault = tools.fault()
    if fault is not None:
        raise invalid(f"tools: {fault}", "tool_choice" if name is not None else "tools")
    return tools
