"""The end tokens of a GGUF file.

A file names the end of a text, but often not that of a turn: tokens that end one
are known by their text.  Called by gguf_config.py, and by the tokenizer's reader.
"""

from __future__ import annotations

from typing import Any

from .gguf_file import GGUFFile

CONTROL, USER_DEFINED = 3, 4
_NAMED = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
_TEXTS = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
    }
)
"""Of the families in gguf_config.py."""


def end_token_ids(file: GGUFFile) -> tuple[int, ...]:
    """What the file names, then what has the text of an end and is no word of the vocabulary."""
    named = [file.get(key) for key in _NAMED]
    known = [
        token
        for token, (text, kind) in enumerate(
            zip(_list(file, "tokens"), _list(file, "token_type"), strict=False)
        )
        if kind in (CONTROL, USER_DEFINED) and text in _TEXTS
    ]
    return tuple(dict.fromkeys(token for token in [*named, *known] if token is not None))


def _list(file: GGUFFile, name: str) -> list[Any]:
    value = file.get(f"tokenizer.ggml.{name}")
    return value if isinstance(value, list) else []
