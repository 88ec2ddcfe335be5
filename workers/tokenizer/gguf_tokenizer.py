"""The tokenizer of a GGUF file, rebuilt as the original one.

"tokenizer.ggml.model" names its kind.  "gpt2" is byte-level BPE: the file has
tokens and merges, and pre_tokenizers.py knows how text is cut before.  "llama"
is SentencePiece BPE: the file has tokens with scores, from which the merges
follow, and unknown characters fall back to bytes; as in llama.cpp, which
defines the format, a space is put before the text and after every special
token in it.  Other kinds belong to model families we do not serve.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from albireo.workers.models.config import ModelError
from albireo.workers.models.gguf_ends import CONTROL, USER_DEFINED, end_token_ids
from albireo.workers.models.gguf_file import GGUFFile

from .errors import TextModelError
from .pre_tokenizers import pre_tokenizer
from .source import TextSource

_NORMAL, _UNKNOWN, _UNUSED = 1, 2, 5
_NAMED_IDS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
_SENTENCEPIECE_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}
_SPACE = "▁"
_PHI3_KEEP_SPACE = ("<unk>", "<s>", "<|endoftext|>")
"""Its other added tokens take the white space behind them, which a file does not say."""


def read_gguf_text(path: Path) -> TextSource:
    """Reads tokenizer and chat template.  Raises TextModelError."""
    try:
        return _build(_GgufText(path))
    except ModelError as error:
        raise TextModelError(str(error)) from error


def _build(file: _GgufText) -> TextSource:
    kind = file.require("tokenizer.ggml.model", str)
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level(file)
    elif kind == "llama":
        tokenizer, add_bos = _sentencepiece(file), True
    else:
        raise TextModelError(
            f"{file.path} has a tokenizer of kind {kind!r}; 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece BPE) are supported: use the model's Hugging Face directory"
        )
    is_phi3 = kind == "llama" and file.get("general.architecture") == "phi3"
    _add_tokens(tokenizer, file, drop_space=is_phi3)
    named = file.named_tokens(_SENTENCEPIECE_IDS if kind == "llama" else {})
    first = _edge_token(file, named, "bos", add_bos)
    last = _edge_token(file, named, "eos", False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*first, *last}],
    )
    return TextSource(
        tokenizer=tokenizer,
        vocab_size=len(file.tokens),
        named_tokens=dict(named),
        chat_template=file.get("tokenizer.chat_template"),
    )


class _GgufText:
    """The text part of a file's fields.

    get: any of them; tokens, types: by token id; ends: ids of tokens that end an answer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = GGUFFile(path)
        self.get = file.get
        self.ends = end_token_ids(file)
        self.tokens: list[str] = self.require("tokenizer.ggml.tokens", list)
        self.types: list[int] = self.get("tokenizer.ggml.token_type", [_NORMAL] * len(self.tokens))
        if len(self.types) != len(self.tokens):
            raise TextModelError(
                f"{path} has {len(self.tokens)} tokens but {len(self.types)} token types"
            )
        # Ids without a token are padding of the embedding: text must never become one of them.
        self.vocabulary = {
            token: index
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind != _UNUSED
        }
        if len(self.vocabulary) != len(self.types) - self.types.count(_UNUSED):
            raise TextModelError(f"{path} has the same token twice in its vocabulary")

    def require(self, key: str, kind: type) -> Any:
        value = self.get(key)
        if not isinstance(value, kind):
            raise TextModelError(
                f"{self.path} has no usable {key}: the file was written without its tokenizer; "
                "use another one or the model's Hugging Face directory"
            )
        return value

    def named_tokens(self, defaults: dict[str, int]) -> dict[str, str]:
        named = {}
        for name, key in _NAMED_IDS.items():
            index = self.get(key, defaults.get(name))
            if index is None:
                continue
            if not 0 <= index < len(self.tokens) or self.types[index] == _UNUSED:
                raise TextModelError(
                    f"{self.path}: {key} is {index}, which is none of its {len(self.tokens)} tokens"
                )
            named[name] = self.tokens[index]
        return named


def _byte_level(file: _GgufText) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether the begin token is added where the file does not say."""
    name = file.get("tokenizer.ggml.pre")
    if name is None:
        logging.warning("%s does not name its pre-tokenizer: GPT-2's is used", file.path)
    rule = pre_tokenizer(name or "default")
    merges = []
    for merge in file.require("tokenizer.ggml.merges", list):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    try:
        model = models.BPE(
            vocab=file.vocabulary, merges=merges, ignore_merges=rule.ignore_merges, fuse_unk=False
        )
    except Exception as error:
        raise TextModelError(f"the vocabulary of {file.path} is not usable: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = rule.normalizer()
    tokenizer.pre_tokenizer = rule.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rule.add_bos


def _sentencepiece(file: _GgufText) -> Tokenizer:
    scores = file.require("tokenizer.ggml.scores", list)
    if len(scores) != len(file.tokens):
        raise TextModelError(
            f"{file.path} has {len(file.tokens)} tokens but {len(scores)} token scores"
        )
    unknown = file.named_tokens(_SENTENCEPIECE_IDS)["unk_token"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=file.vocabulary,
            merges=_merges_of_scores(file, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    decoding: list[decoders.Decoder] = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if file.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend(_SPACE))
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def _merges_of_scores(file: _GgufText, scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece merges the pair whose union scores best: so every split of every piece.

    The order among equal scores is the one of transformers' converters: longer
    left half first, then by ids.
    """
    vocabulary = file.vocabulary
    ranked = []
    for index, piece in enumerate(file.tokens):
        if file.types[index] != _NORMAL:
            continue
        for at in range(1, len(piece)):
            left = vocabulary.get(piece[:at])
            right = vocabulary.get(piece[at:])
            if left is not None and right is not None:
                rank = (-scores[index], -at, at - len(piece), index)
                ranked.append((rank, left, right))
    ranked.sort()
    tokens = file.tokens
    return [(tokens[left], tokens[right]) for _, left, right in ranked]


def _add_tokens(tokenizer: Tokenizer, file: _GgufText, drop_space: bool) -> None:
    """Tokens that the file marks are matched in the text first, and never cut.

    An end token is special whatever its type: its text is never shown.
    drop_space: white space behind a token is part of it, as in Phi-3.
    """
    special: list[AddedToken] = []
    plain: list[AddedToken] = []
    for index, (token, kind) in enumerate(zip(file.tokens, file.types, strict=True)):
        is_special = kind in (CONTROL, _UNKNOWN) or (index in file.ends and kind != _UNUSED)
        if is_special or kind == USER_DEFINED:
            rstrip = drop_space and token not in _PHI3_KEEP_SPACE
            added = AddedToken(token, special=is_special, normalized=False, rstrip=rstrip)
            (special if is_special else plain).append(added)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _edge_token(file: _GgufText, named: dict[str, str], edge: str, default: bool) -> list[str]:
    """The token that the file wants at an edge ("bos" or "eos") of every text; empty for none."""
    if not file.get(f"tokenizer.ggml.add_{edge}_token", default):
        return []
    token = named.get(f"{edge}_token")
    if token is None:
        raise TextModelError(
            f"{file.path} has tokenizer.ggml.add_{edge}_token, or means it, but no "
            f"tokenizer.ggml.{edge}_token_id"
        )
    return [token]
