"""Small tokenizers of the kinds that real models have, built in memory.

Trained on a few lines in several scripts, so that tokens end in the middle of
characters, as those of large vocabularies do.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from albireo.workers.tokenizer.source import TextSource
from albireo.workers.tokenizer.text_model import TextModel

CORPUS = [
    "The quick brown fox jumps over the lazy dog, 1234567890 times.",
    "def f(x):\n    return x ** 2  # naïve café Straße\n\n\n",
    "今日は世界、你好世界。안녕하세요 세계",
    "Привет, мир! γειά σου κόσμε مرحبا بالعالم",
    "👩‍👩‍👧 🙂🙃 🏳️‍🌈 e\u0301 a\u030a",
] * 4
SPECIAL = ["<|end|>", "<|user|>", "<é>"]

NASTY_TEXTS = [
    "",
    " ",
    "\n\n\n \t ",
    "plain words, and some more",
    "12345 67 8",
    "naïve café Straße — “quotes” … ½",
    "e\u0301 vs é, a\u030a vs å",
    "今日は世界、你好世界。안녕하세요",
    "👩‍👩‍👧 🏳️‍🌈 🙂🙃",
    "مرحبا بالعالم",
    "\x00\x01\x7f\u200b\ufeff",
    "a\ufffdb \ufffd",
    "𐍈 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "text with <|end|> inside<|user|>and <é> around",
    "  leading and trailing  ",
    "line\r\nline\rline",
]


@cache
def byte_level() -> Tokenizer:
    """Byte-level BPE with special and added tokens, with a begin token around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|begin|>", *SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # The library puts these through the byte table too, or not, by their characters.
    tokenizer.add_tokens([AddedToken("é x", normalized=False), AddedToken("éx", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    return tokenizer


@cache
def sentencepiece() -> Tokenizer:
    """BPE on "▁" with byte fallback: Llama 2's tokenizer.json, small."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    learner.train_from_iterator([line for line in CORPUS if line.isascii()], trainer)
    learned = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece, _ in learned]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [
        (piece[:at], piece[at:])
        for piece, _ in learned
        for at in range(1, len(piece))
        if piece[:at] in vocabulary and piece[at:] in vocabulary
    ]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def text_model(tokenizer: Tokenizer, **source: object) -> TextModel:
    """A TextModel of a tokenizer in memory."""
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return TextModel(TextSource(tokenizer=tokenizer, vocab_size=size, **source))  # type: ignore[arg-type]


def write_directory(directory: Path, tokenizer: Tokenizer, **files: str) -> Path:
    """Writes tokenizer.json and other files ("tokenizer_config.json": "{...}")."""
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(content, "utf-8")
    return directory
