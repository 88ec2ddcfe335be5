"""How text is cut before byte-level BPE: the rules that a GGUF file only names.

A Hugging Face tokenizer.json spells its rule out.  A GGUF file has one word for
it, "tokenizer.ggml.pre", and this table turns the words of the model families
we serve back into the rule of the original tokenizer.  gguf_tokenizer.py is the
only caller.  A wrong rule would give plausible but different tokens, so an
unknown word is an error, never a guess.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

from .errors import TextModelError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """One rule.

    pattern: the regular expression that cuts; None = the one of GPT-2.
    single_digits: every digit is a piece of its own, before anything else.
    nfc: text is brought into Unicode normal form C first.
    ignore_merges: a piece that is a token as a whole is that token.
    add_bos: the begin token comes first, where the file does not say.
    """

    pattern: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None

    def build(self) -> pre_tokenizers.PreTokenizer:
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.single_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.pattern is not None:
            steps.append(pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"))
        steps.append(
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pattern is None)
        )
        return pre_tokenizers.Sequence(steps)


_GPT2 = PreTokenizer()
_LLAMA = PreTokenizer(pattern=_LLAMA3, ignore_merges=True, add_bos=True)
_QWEN = PreTokenizer(pattern=_QWEN2, nfc=True)
_RULES = {
    "dbrx": PreTokenizer(pattern=_LLAMA3),  # Phi-4
    "default": _GPT2,
    "deepseek-r1-qwen": _QWEN,
    "gpt-2": _GPT2,
    "gpt-4o": PreTokenizer(pattern=_O200K),  # Phi-4-mini
    "gpt2": _GPT2,
    "llama-bpe": _LLAMA,
    "llama-v3": _LLAMA,
    "llama3": _LLAMA,
    "qwen2": _QWEN,
    "smollm": PreTokenizer(single_digits=True),
    "tekken": PreTokenizer(pattern=_TEKKEN, ignore_merges=True, add_bos=True),
}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The rule that a GGUF file means by `name`.  Raises TextModelError for an unknown one."""
    rule = _RULES.get(name)
    if rule is None:
        raise TextModelError(
            f"the pre-tokenizer {name!r} of this GGUF file is not supported "
            f"(known: {', '.join(sorted(_RULES))}); use the model's Hugging Face directory"
        )
    return rule
