"""What a step's sampling has to do: the sampler has fewer launches where no row asks for more."""

from __future__ import annotations

import enum

import numpy as np
import numpy.typing as npt

from ...sampling.params import SlotParams

Int8Array = npt.NDArray[np.int8]


class SamplingKind(enum.IntEnum):
    """Of a row; a step has the highest of its rows."""

    GREEDY = 0
    PLAIN = 1
    """A temperature, and nothing that leaves tokens out."""
    FILTERED = 2
    """Top-k, top-p or min-p."""


def kinds(params: SlotParams, slots: npt.NDArray[np.int32]) -> Int8Array:
    """The kind of each of `slots`."""
    filters = (params.top_k[slots] > 0) | (params.top_p[slots] < 1) | (params.min_p[slots] > 0)
    draws = params.temperature[slots] > 0
    return np.where(draws, np.where(filters, 2, 1), 0).astype(np.int8)
