"""What grammars cost: compiling a schema, and the mask of a row, by size of the vocabulary.

    python tools/grammar_bench.py MODEL [--words 151936] [--tries 5]

MODEL: a GGUF file or directory.  --words: adds made-up tokens (two of the model's
one after the other) up to so many.  A mask is what a worker's thread takes a row and
step: the last token moves the matcher, the mask is written.  Answers follow random
tokens among the allowed ones but the end, until the grammar stops.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from types import SimpleNamespace
from typing import Any

import numpy as np

from albireo.ipc.grammars import Grammar
from albireo.workers.grammar.compile import grammar_text
from albireo.workers.grammar.vocabulary import Vocabulary
from albireo.workers.tokenizer.text_model import load_text_model

_MAX_TOKENS = 150
_GRAMMARS = {
    "small object": Grammar(
        json_schema={
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 40}, "age": {"type": "integer"}},
            "required": ["name", "age"],
            "additionalProperties": False,
        }
    ),
    "40 properties": Grammar(
        json_schema={
            "type": "object",
            "properties": {
                f"field_{i}": {"type": ("string", "integer", "boolean")[i % 3]} for i in range(40)
            },
            "required": [f"field_{i}" for i in range(40)],
        }
    ),
    "500 enum values": Grammar(json_schema={"enum": [f"value number {i}" for i in range(500)]}),
    "any JSON object": Grammar(json_object=True),
    "regex": Grammar(regex=r"[A-Z][a-z]{2,30}( [A-Z][a-z]{2,30}){1,3}, [0-9]{4}-[0-9]{2}"),
    "free text": Grammar(lark="start: /(.|\\n)*/"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--words", type=int, default=0)
    parser.add_argument("--tries", type=int, default=5)
    asked = parser.parse_args()
    text = load_text_model(asked.model)
    begun = time.perf_counter()
    vocabulary, end = _vocabulary(text, asked.words)
    print(f"{vocabulary.size} tokens, vocabulary made in {time.perf_counter() - begun:.2f} s")
    print(f"{'grammar':16} {'compile ms':>10} {'mask us: median':>16} {'p99':>7} {'max':>8}")
    for name, grammar in _GRAMMARS.items():
        made = grammar_text(grammar)
        compile_ms = [_timed(lambda made=made: vocabulary.matcher(made)) for _ in range(7)]
        masks = _masks_us(vocabulary, made, end, asked.tries)
        print(
            f"{name:16} {min(compile_ms) / 1000:10.2f} {statistics.median(masks):16.0f} "
            f"{np.percentile(masks, 99):7.0f} {max(masks):8.0f}"
        )


def _vocabulary(text: Any, words: int) -> tuple[Vocabulary, int]:
    pieces = list(text.token_bytes)
    pick = random.Random(1)
    known = set(pieces)
    plain = [piece for piece in pieces if piece.strip() and len(piece) < 8]
    while len(pieces) < words:
        piece = pick.choice(plain) + pick.choice(plain)
        if piece not in known:
            known.add(piece)
            pieces.append(piece)
    end = min(text.special_ids)
    tokens: Any = SimpleNamespace(
        token_bytes=pieces, special_ids=text.special_ids, encode_plain=text.encode_plain
    )
    return Vocabulary(tokens, len(pieces), [end]), end


def _timed(work: Any) -> float:
    """Microseconds."""
    begun = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - begun) / 1000


def _masks_us(vocabulary: Vocabulary, grammar: str, end: int, tries: int) -> list[float]:
    mask = np.zeros(vocabulary.mask_words, np.int32)
    found = []
    for seed in range(tries):
        pick = random.Random(seed)
        matcher = vocabulary.matcher(grammar)
        token = -1
        for _ in range(_MAX_TOKENS):
            begun = time.perf_counter_ns()
            if token >= 0:
                matcher.consume_tokens([token])
            if matcher.is_stopped():
                break
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            found.append((time.perf_counter_ns() - begun) / 1000)
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
            allowed = np.flatnonzero(bits)
            allowed = allowed[allowed != end]
            token = int(allowed[pick.randrange(len(allowed))]) if len(allowed) else end
    return found


if __name__ == "__main__":
    main()
