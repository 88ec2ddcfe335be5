"""Albireo serves large language models on one node.

Applications need these names; they are loaded when first used, so that
importing the package costs nothing and never brings in torch, numpy or zmq.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import AsyncClient, Client, Grammar, SamplingParams

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "Grammar", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
