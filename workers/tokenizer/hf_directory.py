"""The tokenizer of a Hugging Face directory, as transformers would set it up.

tokenizer.json is the tokenizer, the begin token before a text included;
tokenizer_config.json, or in old directories special_tokens_map.json, adds what
it may lack: tokens, how they match a text, which of them are special, their
names, the chat template (a chat_template.jinja beside them wins; where there is
none, the chat_template.json that models for images have is asked).  Truncation
and padding that tokenizer.json may carry are switched off: a prompt is never
shortened silently.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from .errors import TextModelError
from .source import TextSource

_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_MORE_NAMES = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_OTHER_FORMATS = ("tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model")


def read_hf_text(directory: Path) -> TextSource:
    """Reads tokenizer and chat template.  Raises TextModelError."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise TextModelError(_missing(directory))
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        raise TextModelError(f"{file} is not a usable tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = _read_json(directory / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= _read_json(directory / "special_tokens_map.json")
    named = _named_tokens(config)
    try:
        _add_tokens(tokenizer, directory, config)
    except (AttributeError, TypeError, ValueError) as error:
        if isinstance(error, TextModelError):
            raise
        raise TextModelError(
            f"{directory}: added_tokens_decoder in tokenizer_config.json is malformed: {error}"
        ) from error
    _mark_special_tokens(tokenizer, named)
    return TextSource(
        tokenizer=tokenizer,
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
        named_tokens=named,
        chat_template=_chat_template(directory, config),
    )


def has_tokenizer(directory: Path) -> bool:
    """Whether there is one in any format, be it one that is not read here."""
    return any((directory / name).is_file() for name in ("tokenizer.json", *_OTHER_FORMATS))


def _missing(directory: Path) -> str:
    others = [name for name in _OTHER_FORMATS if (directory / name).is_file()]
    if not others:
        return f"{directory} has no tokenizer.json; pass --tokenizer DIR with one"
    return (
        f"{directory} has {' and '.join(others)} but no tokenizer.json; write one with "
        "transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    )


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TextModelError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise TextModelError(f"{file} should hold a JSON object, not {type(value).__name__}")
    return value


def _content(token: Any) -> str | None:
    """A token is written as a string or as an object with "content"; null means none."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _named_tokens(config: dict[str, Any]) -> dict[str, str | list[str]]:
    named: dict[str, str | list[str]] = {}
    for name in _NAMES:
        token = _content(config.get(name))
        if token is not None:
            named[name] = token
    more: list[str] = []
    for name in _MORE_NAMES:
        value = config.get(name) or []
        for token in map(_content, value.values() if isinstance(value, dict) else value):
            if token is not None and token not in more:
                more.append(token)
    if more:
        named["additional_special_tokens"] = more
    return named


def _add_tokens(tokenizer: Tokenizer, directory: Path, config: dict[str, Any]) -> None:
    """Adds the tokens of tokenizer_config.json; those that tokenizer.json has get its flags.

    They keep their ids.  What is special once stays so, as in the library.
    """
    declared = config.get("added_tokens_decoder") or {}
    special = {
        token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special
    }
    added, missing = [], {}
    for index, entry in sorted(declared.items(), key=lambda item: int(item[0])):
        token = _content(entry)
        if token is None:
            continue
        if tokenizer.token_to_id(token) is None:
            missing[token] = int(index)
        given = {flag: entry.get(flag) for flag in _FLAGS}
        flags = {flag: bool(value) for flag, value in given.items() if value is not None}
        added.append(AddedToken(token, **flags))
        added[-1].special |= token in special
    tokenizer.add_tokens(added)
    for token, index in missing.items():
        if tokenizer.token_to_id(token) != index:
            raise TextModelError(
                f"{directory}: tokenizer_config.json gives {token!r} the id {index}, but "
                f"tokenizer.json leaves only {tokenizer.token_to_id(token)} free for it"
            )


def _mark_special_tokens(tokenizer: Tokenizer, named: dict[str, str | list[str]]) -> None:
    """Makes every named token a special one; how it matches a text stays as it was."""
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for value in named.values():
        for content in [value] if isinstance(value, str) else value:
            token = known.get(content, AddedToken(content, normalized=False))
            token.special = True
            tokenizer.add_special_tokens([token])


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise TextModelError(f"{file} cannot be read: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    if template is None:
        template = _read_json(directory / "chat_template.json").get("chat_template")
    return template if isinstance(template, str) else None
