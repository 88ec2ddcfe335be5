"""Requests with grammars on an engine, the same on the CPU and on a GPU."""

from __future__ import annotations

import re
from types import SimpleNamespace

from albireo.ipc.config import EngineConfig
from albireo.ipc.plan import ROW_GRAMMAR_END
from albireo.workers.grammar.vocabulary import Vocabulary

from ..plans import plan_of
from .engine_driver import Driver, Request
from .engine_story import CONFIG, Results

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-"
END = 63
FIRST = "start: /[a-f]{5}x/"
SECOND = "start: /([0-9][A-C]){3}-?/"


def _encode(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


VOCABULARY = Vocabulary(
    SimpleNamespace(
        token_bytes=[letter.encode() for letter in LETTERS] + [b"<end>"],
        special_ids=frozenset({END}),
        encode_plain=_encode,
    ),  # type: ignore[arg-type]
    CONFIG.vocab_size,
    [END],
)


def play_grammars(driver: Driver) -> list[tuple[list[int], list[list[int]]]]:
    """Each request's output, and its rows without a token; beside one without a grammar."""
    one = Request(1, [5, 9, 33], slot=0, blocks=[7, 3], temperature=1.0, seed=3, grammar=FIRST)
    two = Request(2, [1, 2], slot=2, blocks=[11, 4], grammar=SECOND)
    free = Request(3, [40, 41, 42, 43], slot=1, blocks=[1, 8], temperature=0.7, seed=9)
    prompts = {1: 3, 2: 2, 3: 4, 4: 3}
    rows = driver.run(take=[one, free], chunk=[(one, 3), (free, 4)])
    rows += driver.run(take=[two], chunk=[(two, 2)], decode=[one, free])
    for _ in range(5):
        rows += driver.run(decode=[two, free, one])
    # The first can only stop now; its slot goes to one that had begun elsewhere.
    rows += driver.run(decode=[two])
    tokens = [5, 9, 33, *_encode("ab")]
    again = Request(
        4, tokens, slot=0, blocks=[20, 21], temperature=1.0, seed=3, resumed=2, grammar=FIRST
    )
    rows += driver.run(take=[again], chunk=[(again, 5)], decode=[free])
    for _ in range(3):
        rows += driver.run(decode=[again, free])
    rows += driver.run(decode=[again])
    return [
        (
            request.tokens[prompts[request.number] :],
            [row for row in rows if row[0] == request.number and row[1] == 0],
        )
        for request in (one, two, free, again)
    ]


def check_grammars(found: list[tuple[list[int], list[list[int]]]]) -> None:
    one, two, free, again = found
    assert re.fullmatch("[a-f]{5}x", _text(one[0])) and one[1] == [[1, 0, ROW_GRAMMAR_END]]
    assert re.fullmatch("([0-9][A-C]){3}-?", _text(two[0][:6]))
    assert re.fullmatch("ab[a-f]{3}x", _text(again[0]))
    assert again[1] == [[4, 0, ROW_GRAMMAR_END]]
    assert len(free[0]) == 11 and not free[1]


def check_steps_ahead(results: Results, engine: EngineConfig) -> None:
    """Decodes launched one behind the other, none of them waited for: each mask needs the token
    of the step before, which only the engine has."""
    driver = Driver(results.step, engine)
    one = Request(1, [5, 9], slot=0, blocks=[7], temperature=1.0, seed=1, grammar=FIRST)
    driver.run(take=[one], chunk=[(one, 2)])
    sizes = (
        engine.max_num_seqs, engine.max_num_batched_tokens, engine.block_size,
        engine.max_model_len,
    )  # fmt: skip
    for number in range(7):
        plan = plan_of(*sizes, step=number + 1, decode=[0])
        assert results.engine.step(plan, False) is None
    results.engine.finish()
    assert not results.failures
    rows = [row for (row,) in results.rows]
    assert re.fullmatch("[a-f]{5}x", _text([token for _, _, token in rows[:6]]))
    assert rows[6:] == [[1, 0, ROW_GRAMMAR_END]] * 2


def _text(tokens: list[int]) -> str:
    return "".join(LETTERS[token] if token < END else "" for token in tokens)
