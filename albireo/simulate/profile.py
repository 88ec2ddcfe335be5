"""How long a step takes: measured, and fitted with what a step is made of.

    step = max(weights(rows), rows * prefill_token_us) + kv_tokens * kv_token_ns + pairs * pair_ns

rows are the tokens that are computed: one for each decode, and the prefill's.
weights(rows) is the time to read the weights, between the points that were
measured; with many rows the products take longer than that.  kv_tokens are the
tokens whose keys and values the decodes read, pairs the products of prefill
tokens with what they look at.  Of all that several ranks do an equal part each,
and take parallel_us more, for what they exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

_FOLDER = "profiles"
_Amount = Annotated[float, msgspec.Meta(ge=0)]
_AtLeast1 = Annotated[int, msgspec.Meta(ge=1)]


class ProfileError(ValueError):
    """There is no such profile, or it is damaged; the text is for the user."""


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """name, source: what was measured, and where the figures are.

    rows, rows_ms: points of weights(rows), ascending.
    split: ranks of a group share a step's work; else it takes as long with any number of them.
    parallel_us: of a step, where several ranks share it.
    swap_block_us: to copy one KV block to host memory, or back.
    input_ms, output_ms: from the client to the scheduler, and from the device to the client.
    kv_tokens, mixed_step_tokens: of a rank, and max_num_batched_tokens of a group, where the user
        gives none.
    """

    name: str
    source: str = ""
    rows: tuple[int, ...]
    rows_ms: tuple[float, ...]
    prefill_token_us: _Amount = 0.0
    kv_token_ns: _Amount = 0.0
    pair_ns: _Amount = 0.0
    split: bool = True
    parallel_us: _Amount = 0.0
    swap_block_us: _Amount = 0.0
    input_ms: _Amount = 0.0
    output_ms: _Amount = 0.0
    kv_tokens: _AtLeast1 = 1 << 20
    max_num_batched_tokens: _AtLeast1 = 2048
    mixed_step_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0


class StepTimes:
    """Of a profile: the first term of the sum is computed beforehand, for each number of `rows`
    that a step may have.

    least_s: no step takes less.  swap_block_us: of each rank, for its part of a block.
    """

    def __init__(self, profile: Profile, rows: Sequence[int], ranks: int = 1) -> None:
        ranks = ranks if profile.split else 1
        weights_s = np.interp(rows, profile.rows, profile.rows_ms) * 1e-3
        products_s = np.array(rows) * (profile.prefill_token_us * 1e-6)
        rows_s = np.maximum(weights_s, products_s) / ranks
        if ranks > 1:
            rows_s += profile.parallel_us * 1e-6
        self._rows_s: dict[int, float] = dict(zip(rows, rows_s.tolist(), strict=True))
        self._kv_token_s = profile.kv_token_ns * 1e-9 / ranks
        self._pair_s = profile.pair_ns * 1e-9 / ranks
        self.swap_block_us = profile.swap_block_us / ranks
        self.least_s = float(rows_s.min())

    def step_s(self, rows: int, kv_tokens: int, pairs: int, swapped: int) -> float:
        """Seconds of a step.  swapped: KV blocks that it copies to or from host memory."""
        return (
            self._rows_s[rows]
            + kv_tokens * self._kv_token_s
            + pairs * self._pair_s
            + swapped * self.swap_block_us * 1e-6
        )


def load_profile(name: str) -> Profile:
    """A profile of the package, a JSON file, or `sim:MS[:PATH]`: steps that all take as long, and
    PATH milliseconds from the client to the device and back.

    Raises ProfileError.
    """
    kind, _, value = name.partition(":")
    if kind == "sim":
        return _constant(name, value)
    try:
        if name.endswith(".json"):
            data = Path(name).read_bytes()
        else:
            data = resources.files(__package__).joinpath(_FOLDER, f"{name}.json").read_bytes()
    except OSError:
        raise ProfileError(
            f"there is no profile {name!r}: give {', '.join(known_profiles())}, sim:MS, or a JSON "
            "file"
        ) from None
    try:
        profile = msgspec.json.decode(data, type=Profile)
    except msgspec.MsgspecError as error:
        raise ProfileError(f"the profile {name} cannot be read: {error}") from None
    if not profile.rows or len(profile.rows) != len(profile.rows_ms):
        raise ProfileError(f"the profile {name} needs as many rows as rows_ms, and one at least")
    if list(profile.rows) != sorted(set(profile.rows)):
        raise ProfileError(f"the rows of the profile {name} are not in ascending order")
    if not all(0 < each < float("inf") for each in profile.rows_ms):
        raise ProfileError(f"the profile {name} has rows_ms that are no time: all must be above 0")
    return profile


def known_profiles() -> list[str]:
    """Names of the profiles of the package."""
    folder = resources.files(__package__).joinpath(_FOLDER)
    return sorted(each.name.removesuffix(".json") for each in folder.iterdir())


def _constant(name: str, value: str) -> Profile:
    step, colon, path = value.partition(":")
    try:
        step_ms, path_ms = float(step), float(path) if colon else 0.0
    except ValueError:
        step_ms = path_ms = 0.0
    if not (0 < step_ms < float("inf") and 0 <= path_ms < float("inf")):
        raise ProfileError(
            f"{name!r}: give sim:MS, such as sim:20, or sim:MS:PATH, such as sim:20:2.5"
        )
    return Profile(
        name=name,
        rows=(1,),
        rows_ms=(step_ms,),
        split=False,
        input_ms=path_ms / 2,
        output_ms=path_ms / 2,
    )
