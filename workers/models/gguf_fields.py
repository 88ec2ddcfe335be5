"""The fields of one architecture in a GGUF file, with typed access; for gguf_config.py."""

from __future__ import annotations

from typing import Any

from .config import ModelError
from .gguf_file import GGUFFile
from .hf_settings import number_above_zero


class Fields:
    """Fields by what stands behind the architecture: "block_count" is "llama.block_count".

    Errors name the file and the field.
    """

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file = file
        self._prefix = architecture + "."

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.get(self._prefix + key, default)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or value < 1:
            raise self.error(key, "a whole number above 0 is needed")
        return value

    def number(self, key: str, default: float) -> float:
        return number_above_zero(self.file.path, self._prefix + key, self.get(key, default))

    def error(self, key: str, what: str) -> ModelError:
        return ModelError(f"{self.file.path}: {self._prefix}{key} is {self.get(key)!r}: {what}")
