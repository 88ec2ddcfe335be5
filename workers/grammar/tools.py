"""The grammar of answers that may, or have to, call tools.

In the form that the model's template teaches:

    hermes   <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>, after any text
    llama    {"name": "f", "parameters": {...}}, and nothing else

albireo/client/tool_calls.py reads exactly these out of answers; any other text is no call.
Arguments always fit the function's schema: where the model decides whether to call, the grammar
lets any text pass up to the mark with which a call begins.
"""

from __future__ import annotations

import json
from typing import Any

from albireo.ipc.tools import HERMES, LLAMA, Tool, Tools, call_head

from .json_options import JSON_OPTIONS

_NO_PARAMETERS: dict[str, Any] = {
    "type": "object", "properties": {}, "additionalProperties": False,
}  # fmt: skip
_RULES = {
    (HERMES, "auto"): 'start: (lead body close)* TEXT\nlead[lazy]: /(.|\\n)*/ "<tool_call>"',
    (HERMES, "one"): 'start: lead body close | TEXT\nlead[lazy]: /(.|\\n)*/ "<tool_call>"',
    (HERMES, "required"): 'start: call ("\\n" call)*\ncall: "<tool_call>" body close',
    (HERMES, "required one"): 'start: "<tool_call>" body close',
    (LLAMA, "auto"): "start: body | TEXT_FIRST\nTEXT_FIRST: /([^{](.|\\n)*)?/",
    (LLAMA, "one"): "start: body | TEXT_FIRST\nTEXT_FIRST: /([^{](.|\\n)*)?/",
    (LLAMA, "required"): "start: body",
    (LLAMA, "required one"): "start: body",
}
_COMMON = {
    HERMES: 'close: /\\n?/ "</tool_call>"\nTEXT: /(.|\\n)*/\nbody: /\\n?/ function',
    LLAMA: "body: function",
}


def tools_grammar(tools: Tools, style: str) -> str:
    """What matchers are made of; tools.bind must hold."""
    functions = tools.functions
    required = tools.choice == "required" or tools.name is not None
    if tools.name is not None:
        functions = tuple(each for each in functions if each.name == tools.name)
    one = not tools.parallel or tools.name is not None
    kind = ("required one" if one else "required") if required else ("one" if one else "auto")
    numbers = range(len(functions))
    parts = ["%llguidance {}", _RULES[style, kind], _COMMON[style]]
    parts.append("function: " + " | ".join(f"function_{number}" for number in numbers))
    parts += [f"function_{number}: {_call(functions[number], style)}" for number in numbers]
    return "\n".join(parts) + "\n"


def _call(tool: Tool, style: str) -> str:
    parameters = tool.parameters or _NO_PARAMETERS
    options = parameters.get("x-guidance")
    options = (options if isinstance(options, dict) else {}) | JSON_OPTIONS
    # A schema without a type allows any value, and arguments are an object.
    schema = {"type": "object"} | parameters | {"x-guidance": options}
    return f'{json.dumps(call_head(tool.name, style))} %json {json.dumps(schema)} "}}"'
