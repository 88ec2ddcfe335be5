"""How long a step takes: measured, and fitted with what a step is made of.

    step = max(weights(rows), rows * prefill_token_us) + kv_tokens * kv_token_ns + pairs * pair_ns

rows are the tokens that are computed: one for each decode, and the prefill's.
weights(rows) is the time to read the weights, between the points that were
measured; with many rows the products take longer than that.  kv_tokens are the
tokens whose keys and values the decodes read, pairs the products of prefill
tokens with what they look at.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import msgspec
import numpy as np

_FOLDER = "profiles"


class ProfileError(ValueError):
    """There is no such profile, or it is damaged; the text is for the user."""


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """name, source: what was measured, and where the figures are.

    rows, rows_ms: points of weights(rows), ascending.
    swap_block_us: to copy one KV block to host memory, or back.
    input_ms, output_ms: from the client to the scheduler, and from the device to the client.
    kv_tokens, max_num_batched_tokens: of a group, where the user gives none.
    """

    name: str
    source: str = ""
    rows: tuple[int, ...]
    rows_ms: tuple[float, ...]
    prefill_token_us: float = 0.0
    kv_token_ns: float = 0.0
    pair_ns: float = 0.0
    swap_block_us: float = 0.0
    input_ms: float = 0.0
    output_ms: float = 0.0
    kv_tokens: int = 1 << 20
    max_num_batched_tokens: int = 2048


class StepTimes:
    """Of a profile: the first term of the sum, for up to most_rows rows, is computed beforehand."""

    def __init__(self, profile: Profile, most_rows: int) -> None:
        rows = np.arange(most_rows + 1)
        weights_s = np.interp(rows, profile.rows, profile.rows_ms) * 1e-3
        products_s = rows * (profile.prefill_token_us * 1e-6)
        self._rows_s: list[float] = np.maximum(weights_s, products_s).tolist()
        self._kv_token_s = profile.kv_token_ns * 1e-9
        self._pair_s = profile.pair_ns * 1e-9
        self._swap_s = profile.swap_block_us * 1e-6

    def step_s(self, rows: int, kv_tokens: int, pairs: int, swapped: int) -> float:
        """Seconds of a step.  swapped: KV blocks that it copies to or from host memory."""
        return (
            self._rows_s[rows]
            + kv_tokens * self._kv_token_s
            + pairs * self._pair_s
            + swapped * self._swap_s
        )


def load_profile(name: str) -> Profile:
    """A profile of the package, a JSON file, or `sim:MS`: steps that all take as long.

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
    return profile


def known_profiles() -> list[str]:
    """Names of the profiles of the package."""
    folder = resources.files(__package__).joinpath(_FOLDER)
    return sorted(each.name.removesuffix(".json") for each in folder.iterdir())


def _constant(name: str, value: str) -> Profile:
    try:
        step_ms = float(value)
    except ValueError:
        step_ms = 0.0
    if not step_ms > 0:
        raise ProfileError(f"{name!r}: give sim:MS, such as sim:20")
    return Profile(name=name, rows=(1,), rows_ms=(step_ms,))
