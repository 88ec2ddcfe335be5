"""Messages of a chat request to those of the node: text only, parts joined.

A refusal is text like any other: the model said it.
"""

from __future__ import annotations

from albireo.client import ChatMessage, TemplateOptions, ToolCall

from .errors import invalid
from .requests import ChatRequest, ContentPart, Message, TokenizeRequest

MAX_MESSAGES = 4096


def chat_messages(messages: list[Message]) -> list[ChatMessage]:
    """Raises HttpError (400), which names the message."""
    if len(messages) > MAX_MESSAGES:
        raise invalid(f"{len(messages)} messages are too many; at most {MAX_MESSAGES}", "messages")
    return [_message(each, f"messages[{place}]") for place, each in enumerate(messages)]


def template_options(asked: ChatRequest | TokenizeRequest) -> TemplateOptions:
    """How the conversation becomes a prompt.  Raises HttpError (400)."""
    options = TemplateOptions(
        variables=asked.chat_template_kwargs or {},
        add_generation_prompt=asked.add_generation_prompt,
        continue_final_message=bool(asked.continue_final_message),
    )
    if (fault := options.fault()) is not None:
        param = "chat_template_kwargs"
        if options.continue_final_message and options.begins_answer:
            param = "continue_final_message"
        raise invalid(fault, param)
    return options


def _message(message: Message, where: str) -> ChatMessage:
    if message.annotations:
        raise invalid(f"{where}: annotations are not read", f"{where}.annotations")
    calls = tuple(
        ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
        for call in message.tool_calls or ()
    )
    if message.content is None and not calls and message.role != "assistant":
        raise invalid(f"{where} has no content", f"{where}.content")
    return ChatMessage(
        role="system" if message.role == "developer" else message.role,
        content=_content(message, where),
        tool_calls=calls,
        tool_call_id=message.tool_call_id or "",
        name=message.name or "",
    )


def _content(message: Message, where: str) -> str:
    content = message.content or ()
    texts = [content] if isinstance(content, str) else [_text(part, where) for part in content]
    if message.refusal:
        texts.append(message.refusal)
    return "\n".join(texts)


def _text(part: ContentPart, where: str) -> str:
    if part.type not in ("text", "refusal"):
        raise invalid(
            f"{where}: a content part of type {part.type[:64]!r} is not supported: the model "
            "reads text only",
            f"{where}.content",
        )
    text = part.text if part.type == "text" else part.refusal
    if text is None:
        raise invalid(f"{where}: a {part.type} part has no {part.type}", f"{where}.content")
    return text
