"""The client library: generate, chat and the rest over a node's Unix socket, or TLS.

    from albireo import Client, SamplingParams

    with Client.connect() as client:
        print(client.generate("Once upon a time", max_tokens=64).text)

AsyncClient is the same for asyncio.  Both keep any number of requests in
flight on one connection.  Nothing here imports torch, numpy or zmq.
"""

from __future__ import annotations

from albireo.ipc.grammars import Grammar
from albireo.ipc.params import SamplingParams
from albireo.ipc.protocol import (
    ChatMessage,
    Delta,
    End,
    Logprobs,
    ModelCard,
    TokenLogprob,
    Welcome,
)
from albireo.ipc.template import TemplateOptions
from albireo.ipc.tools import Tool, ToolCall, Tools

from .asynchronous import AsyncClient, AsyncDeltaStream
from .blocking import Client, DeltaStream
from .errors import (
    AlbireoError,
    AuthenticationError,
    ConnectionLost,
    GroupFailed,
    InternalError,
    InvalidRequest,
    NodeNotRunning,
    ProtocolMismatch,
    QueueFull,
    TimedOut,
    TooLarge,
    TooLong,
    Unavailable,
)
from .results import Choice, Completion, Usage
from .tool_calls import ToolCallReader

__all__ = [
    "AlbireoError",
    "AsyncClient",
    "AsyncDeltaStream",
    "AuthenticationError",
    "ChatMessage",
    "Choice",
    "Client",
    "Completion",
    "ConnectionLost",
    "Delta",
    "DeltaStream",
    "End",
    "Grammar",
    "GroupFailed",
    "InternalError",
    "InvalidRequest",
    "Logprobs",
    "ModelCard",
    "NodeNotRunning",
    "ProtocolMismatch",
    "QueueFull",
    "SamplingParams",
    "TemplateOptions",
    "TimedOut",
    "TokenLogprob",
    "TooLarge",
    "TooLong",
    "Tool",
    "ToolCall",
    "ToolCallReader",
    "Tools",
    "Unavailable",
    "Usage",
    "Welcome",
]
