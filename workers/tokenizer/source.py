"""What a model's files say about its text, before it becomes a TextModel.

Made by hf_directory.py and gguf_tokenizer.py, used up by text_model.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenizers import Tokenizer


@dataclass(frozen=True)
class TextSource:
    """A model's tokenizer and template.

    named_tokens: what a chat template may call by name: "bos_token", "eos_token", ...
        ("additional_special_tokens" is a list).
    chat_template: Jinja source; None where the model has none.
    vocab_size: ids that the vocabulary covers, holes included.
    """

    tokenizer: Tokenizer
    vocab_size: int
    named_tokens: Mapping[str, str | list[str]] = field(default_factory=dict)
    chat_template: str | None = None
