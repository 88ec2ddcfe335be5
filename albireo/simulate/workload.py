"""Who asks when for what: a trace file, or arrivals at random.

A trace is a file of JSON lines, in the order of time, one for each request:

    {"at": 0.25, "input_len": 256, "output_len": 64}

    at            seconds since the beginning
    input_len     tokens of the prompt, or `prompt_ids` in their place
    output_len    tokens of the answer
    prefix, prefix_len    a name, and how many of the first tokens all requests of that name share
    tenant, priority      as in a request
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from .profile import Profile, StepTimes

VOCAB = 32_000
_LATEST_S = 1e9
"""Much later the clock, a float, would no longer tell two steps apart."""

_Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_AtLeast0 = Annotated[int, msgspec.Meta(ge=0)]


class WorkloadError(ValueError):
    """The trace or the arrivals make no sense; the text is for the user."""


class Arrival(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line of a trace."""

    at: float
    output_len: int
    input_len: int = 0
    prompt_ids: list[_Id] | None = None
    prefix: str = ""
    prefix_len: _AtLeast0 = 0
    tenant: str = ""
    priority: int = 0


class Prompts:
    """Token ids for arrivals that name only lengths, from a seed."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._seed = seed
        self._prefixes: dict[str, array[int]] = {}

    def of(self, arrival: Arrival) -> array[int]:
        if arrival.prompt_ids is not None:
            return array("i", arrival.prompt_ids)
        common = self._prefix(arrival.prefix, min(arrival.prefix_len, arrival.input_len))
        rest = self._rng.integers(0, VOCAB, arrival.input_len - len(common), dtype=np.int32)
        own = array("i", rest.tobytes())
        return common + own if common else own

    def _prefix(self, name: str, length: int) -> array[int]:
        if not length:
            return array("i")
        known = self._prefixes.get(name)
        if known is None or len(known) < length:
            seeds = [self._seed, *name.encode()]
            drawn = np.random.default_rng(seeds).integers(0, VOCAB, length, dtype=np.int32)
            known = self._prefixes[name] = array("i", drawn.tobytes())
        return known[:length]


def read_trace(path: Path) -> Iterator[Arrival]:
    """Raises WorkloadError, with the line."""
    decode = msgspec.json.Decoder(Arrival).decode
    last = 0.0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    arrival = decode(line)
                except msgspec.MsgspecError as error:
                    raise WorkloadError(f"{path}, line {number}: {error}") from None
                if arrival.at < last:
                    raise WorkloadError(
                        f"{path}, line {number}: at {arrival.at} comes after {last}; a trace is "
                        "in the order of time"
                    )
                _check(arrival, f"{path}, line {number}")
                last = arrival.at
                yield arrival
    except OSError as error:
        raise WorkloadError(f"the trace cannot be read: {error}") from None


def arrival_rate(
    text: str, profile: Profile, ranks: tuple[int, ...], batch: int, input_len: int, output_len: int
) -> float:
    """Requests a second from `poisson:RATE` or `load:SHARE`.  Raises WorkloadError.

    ranks: of each group.  batch: its slots.

    A load of 1 is what groups with all slots taken serve: an answer takes its
    decode steps at that batch, and its part of them a prefill of its own.
    """
    kind, _, value = text.partition(":")
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if kind not in ("poisson", "load") or not number > 0:
        raise WorkloadError(f"--arrivals {text!r}: give poisson:RATE or load:SHARE")
    if kind == "poisson":
        return number
    context = batch * (input_len + output_len // 2)
    # While one answer decodes, each of the others' prompts is computed once.
    prefill, pairs = batch * input_len, batch * input_len * input_len // 2
    rate = 0.0
    for each in ranks:
        times = StepTimes(profile, (0, batch, prefill), each)
        decode_s = output_len * times.step_s(batch, context, 0, 0)
        alone_s = times.step_s(prefill, 0, pairs, 0)
        idle_s = times.step_s(0, 0, 0, 0)
        rate += number * batch / (decode_s + max(0.0, alone_s - idle_s))
    return rate


def random_arrivals(
    rate: float,
    requests: int,
    input_len: int,
    output_len: int,
    prefix_len: int,
    prefixes: int,
    seed: int,
) -> Iterator[Arrival]:
    """Poisson arrivals, `rate` a second; each begins with one of `prefixes` common prefixes."""
    if not rate > 0:
        raise WorkloadError(f"the rate of arrivals must be above 0, not {rate}")
    rng = np.random.default_rng([seed, 1])
    at = 0.0
    for _ in range(requests):
        at += float(rng.exponential(1 / rate))
        name = str(int(rng.integers(prefixes))) if prefix_len else ""
        arrival = Arrival(
            at=at, input_len=input_len, output_len=output_len, prefix=name, prefix_len=prefix_len
        )
        _check(arrival, "an arrival")
        yield arrival


def _check(arrival: Arrival, where: str) -> None:
    if not arrival.at <= _LATEST_S:
        raise WorkloadError(
            f"{where}: at {arrival.at:g} s; the latest is {_LATEST_S:g} s: have them come faster"
        )
    length = arrival.input_len if arrival.prompt_ids is None else len(arrival.prompt_ids)
    if length < 1 or arrival.output_len < 1:
        raise WorkloadError(
            f"{where}: {length} prompt tokens and {arrival.output_len} new ones; both have to be "
            "at least 1"
        )
