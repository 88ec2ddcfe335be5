"""How JSON is written that a schema binds."""

from __future__ import annotations

from typing import Any

JSON_OPTIONS: dict[str, Any] = {
    "whitespace_flexible": False,
    "key_separator": ": ?",
    "item_separator": ", ?",
}
"""White space is bounded: a model that is unsure could fill its answer with it."""
