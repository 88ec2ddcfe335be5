"""What is asked: prompts made up from a seed, or read from a file.

Made-up prompts are token ids where the endpoint takes them (/v1/completions of
vLLM, SGLang, llama.cpp and this project does): their length is exact, and
nobody has to know the tokenizer.  The ids are those that every tokenizer of a
present model has, none of them special.  /v1/chat/completions takes text only:
there, and for servers that take no ids, prompts are common English words, each
one token of nearly every vocabulary; the server's `usage` tells the true length.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

DATASETS = ("random", "sharegpt", "custom", "prefix_repetition")
_SEEDS_APART = 1 << 32
"""Nobody gives seeds that are so far from one another."""
_CHARS_PER_TOKEN = 4
"""Of English text, for the lengths of answers in ShareGPT's file."""
_SHAREGPT_MIN, _SHAREGPT_MAX_PROMPT, _SHAREGPT_MAX_TOTAL = 4, 1024, 2048
"""Tokens: what the field's benches take of that file."""

_TEXT = """
time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work government number
night point home water room mother area money story fact month lot right study book eye job word
business issue side kind head house service friend father power hour game line end member law
car city community name president team minute idea body information back parent face others
level office door health person art war history party result change morning reason research girl
guy moment air teacher force education foot boy age policy music market sense nation plan
college interest death experience effect use class control field development role effort rate
heart drug show leader light voice wife police mind price report decision son view relationship
town road arm difference value building action season society tax director position player
record paper space ground form event official matter center couple site project activity star
table need court oil situation cost industry
"""
_WORDS = _TEXT.split()


class DatasetError(ValueError):
    """The data set cannot be read or makes no sense; the text is for the user."""


class DatasetOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Lengths are in tokens.

    as_ids: made-up prompts are token ids, from `ids` (first, one behind the last).
    input_len, output_len: of random prompts, which differ by up to `range_ratio` of them.
    prefix_len: of every random prompt, the same tokens.
    path: of sharegpt's and custom's file.  text_output_len: of their answers, where the
        file does not say.
    """

    name: str = "random"
    num_prompts: int = 1000
    seed: int = 0
    as_ids: bool = True
    ids: tuple[int, int] = (1000, 30000)
    input_len: int = 1024
    output_len: int = 128
    range_ratio: float = 0.0
    prefix_len: int = 0
    repeated_prefix_len: int = 256
    repeated_suffix_len: int = 256
    num_prefixes: int = 10
    repeated_output_len: int = 128
    path: Path | None = None
    text_output_len: int | None = None


class Asked(msgspec.Struct, frozen=True):
    """One prompt, a text or token ids, and how many new tokens it asks for at most."""

    prompt: str | list[int]
    output_len: int


def make_requests(options: DatasetOptions) -> list[Asked]:
    """`num_prompts` of them; the same for the same options.  Raises DatasetError."""
    rng = random.Random(options.seed)
    made = {
        "random": _random,
        "prefix_repetition": _prefix_repetition,
        "sharegpt": _sharegpt,
        "custom": _custom,
    }
    if options.name not in made:
        raise DatasetError(f"{options.name!r} is not one of {', '.join(DATASETS)}")
    return list(made[options.name](options, rng))


def make_warm_ups(options: DatasetOptions, count: int) -> list[Asked]:
    """As many to be asked before, from another seed: those to measure are to meet a cold cache."""
    return make_requests(
        msgspec.structs.replace(options, num_prompts=count, seed=options.seed + _SEEDS_APART)
    )


def _random(options: DatasetOptions, rng: random.Random) -> Iterator[Asked]:
    draw = _drawing(options, rng)
    prefix = draw(options.prefix_len)
    for _ in range(options.num_prompts):
        own = draw(_about(options.input_len, options.range_ratio, rng))
        yield Asked(_joined(prefix, own), _about(options.output_len, options.range_ratio, rng))


def _prefix_repetition(options: DatasetOptions, rng: random.Random) -> Iterator[Asked]:
    draw = _drawing(options, rng)
    prefixes = [draw(options.repeated_prefix_len) for _ in range(options.num_prefixes)]
    asked = [
        Asked(
            _joined(prefixes[number % options.num_prefixes], draw(options.repeated_suffix_len)),
            options.repeated_output_len,
        )
        for number in range(options.num_prompts)
    ]
    rng.shuffle(asked)
    yield from asked


def _drawing(options: DatasetOptions, rng: random.Random) -> Callable[[int], list[Any]]:
    """Gives so many random tokens: ids or words."""
    if not options.as_ids:
        return lambda length: rng.choices(_WORDS, k=length)
    first, behind = options.ids
    if not 0 <= first < behind:
        raise DatasetError(f"token ids from {first} to {behind - 1}: there are none")
    return lambda length: rng.choices(range(first, behind), k=length)


def _joined(prefix: list[Any], own: list[Any]) -> str | list[int]:
    tokens = prefix + own
    if not tokens:
        raise DatasetError("a prompt needs at least one token: give lengths above 0")
    return " ".join(tokens) if isinstance(tokens[0], str) else tokens


def _about(length: int, ratio: float, rng: random.Random) -> int:
    if not ratio:
        return length
    return max(1, rng.randint(round(length * (1 - ratio)), round(length * (1 + ratio))))


class _Turn(msgspec.Struct):
    value: str


class _Conversation(msgspec.Struct):
    conversations: list[_Turn] = []


def _sharegpt(options: DatasetOptions, rng: random.Random) -> list[Asked]:
    """First turns as prompts; answers are as long as the file's, at four characters a token."""
    path = _path(options)
    try:
        found = msgspec.json.decode(path.read_bytes(), type=list[_Conversation])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is no ShareGPT file: {error}") from None
    asked = []
    for each in found:
        if len(each.conversations) < 2:
            continue
        prompt, answer = each.conversations[0].value, each.conversations[1].value
        prompt_len = len(prompt) // _CHARS_PER_TOKEN
        output_len = options.text_output_len or len(answer) // _CHARS_PER_TOKEN
        if (
            min(prompt_len, output_len) >= _SHAREGPT_MIN
            and prompt_len <= _SHAREGPT_MAX_PROMPT
            and prompt_len + output_len <= _SHAREGPT_MAX_TOTAL
        ):
            asked.append(Asked(prompt, output_len))
    return _as_many(asked, options, rng)


class _Line(msgspec.Struct):
    prompt: str
    output_len: int | None = None
    output_tokens: int | None = None


def _custom(options: DatasetOptions, rng: random.Random) -> list[Asked]:
    """Lines of {"prompt": TEXT}, with "output_len" (or "output_tokens") where they differ."""
    path = _path(options)
    decode = msgspec.json.Decoder(_Line).decode
    asked = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DatasetError(f"the prompts cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DatasetError(f"{path}, line {number}: {error}") from None
        length = found.output_len or found.output_tokens or options.text_output_len
        asked.append(Asked(found.prompt, length or options.output_len))
    return _as_many(asked, options, rng)


def _as_many(asked: list[Asked], options: DatasetOptions, rng: random.Random) -> list[Asked]:
    """In a random order; where the file has less than are wanted, again from the start."""
    if not asked:
        raise DatasetError(f"{options.path} has no prompt that can be used")
    rng.shuffle(asked)
    rounds = -(-options.num_prompts // len(asked))
    return (asked * rounds)[: options.num_prompts]


def _path(options: DatasetOptions) -> Path:
    if options.path is None:
        raise DatasetError(f"the data set {options.name} needs --dataset-path")
    return options.path
