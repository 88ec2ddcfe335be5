"""Albireo serves large language models on one node.

Applications need these names; they are loaded when first used, so that
importing the package costs nothing and never brings in torch, numpy or zmq.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .client import AlbireoError, AsyncClient, Client, Grammar, SamplingParams
    from .offline import LLM

__all__ = [
    "LLM",
    "AlbireoError",
    "AsyncClient",
    "Client",
    "Grammar",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from .offline import LLM

        return LLM
    if name in __all__:
        from . import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
