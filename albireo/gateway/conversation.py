"""Messages of a chat request to those of the node: text only, parts joined."""

from __future__ import annotations

from albireo.client import ChatMessage, ToolCall

from .errors import invalid
from .requests import ContentPart, Message

MAX_MESSAGES = 4096


def chat_messages(messages: list[Message]) -> list[ChatMessage]:
    """Raises HttpError (400), which names the message."""
    if len(messages) > MAX_MESSAGES:
        raise invalid(f"{len(messages)} messages are too many; at most {MAX_MESSAGES}", "messages")
    return [_message(each, f"messages[{place}]") for place, each in enumerate(messages)]


def _message(message: Message, where: str) -> ChatMessage:
    if message.annotations:
        raise invalid(f"{where}: annotations are not read", f"{where}.annotations")
    if message.name and message.role != "tool":
        raise invalid(f"{where}: only a tool's message has a name", f"{where}.name")
    content = message.content
    calls = tuple(
        ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
        for call in message.tool_calls or ()
    )
    if content is None and calls:
        content = ""
    if content is None:
        raise invalid(f"{where} has no content", f"{where}.content")
    if not isinstance(content, str):
        content = "\n".join(_text(part, where) for part in content)
    return ChatMessage(
        role="system" if message.role == "developer" else message.role,
        content=content,
        tool_calls=calls,
        tool_call_id=message.tool_call_id or "",
        name=message.name or "",
    )


def _text(part: ContentPart, where: str) -> str:
    if part.type != "text":
        raise invalid(
            f"{where}: a content part of type {part.type[:64]!r} is not supported: the model "
            "reads text only",
            f"{where}.content",
        )
    if part.text is None:
        raise invalid(f"{where}: a text part has no text", f"{where}.content")
    return part.text
