"""A config.json with typed access, for hf_config.py and those it calls."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import ModelError


class Settings:
    """config.json with typed access; errors name the file and the key."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def has(self, key: str) -> bool:
        return key in self.values

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(f"{key} is {value!r}, but has to be a whole number above 0")
        return value

    def number(self, key: str, default: float) -> float:
        return number_above_zero(self.path, key, self.get(key, default))

    def error(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: {what}")


def number_above_zero(path: Path, key: str, value: Any) -> float:
    """`value` as a float; ModelError unless it is a finite number above 0."""
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or value <= 0:
        raise ModelError(f"{path}: {key} is {value!r}, but has to be a number above 0")
    return float(value)


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: a JSON object is expected, found {type(values).__name__}")
    return values
