"""What the tests of sampling share: rows and parameters in short, and the filters by sorting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from albireo.workers.sampling.params import SampleRows, SlotParams
from albireo.workers.sampling.sampler import RowSampler


@dataclass(frozen=True)
class Filters:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def params_of(*rows: Filters, seeds: list[int] | None = None) -> SlotParams:
    params = SlotParams.zeros(len(rows))
    for slot, row in enumerate(rows):
        params.temperature[slot] = row.temperature
        params.top_k[slot] = row.top_k
        params.top_p[slot] = row.top_p
        params.min_p[slot] = row.min_p
        params.seed[slot] = seeds[slot] if seeds else 0
    return params


def rows_of(slots: Any, positions: Any) -> SampleRows:
    slots = np.asarray(slots, np.int32)
    return SampleRows(slots=slots, requests=slots, positions=np.asarray(positions, np.int32))


def draw(logits: np.ndarray, rows: SampleRows, params: SlotParams) -> np.ndarray:
    """One token a row of logits [R, V]."""
    logits = np.ascontiguousarray(logits, np.float32)
    tokens = np.empty(len(logits), np.int32)
    RowSampler(logits.shape[1]).sample(logits, rows, params, 0, 1, tokens)
    return tokens


def reference_kept(logits: np.ndarray, by: Filters, margin: float = 0.0) -> set[int]:
    """The same by sorting in float64; `margin` moves top_p."""
    z = np.asarray(logits, np.float32).astype(np.float64)
    scaled = (z - z.max()) / np.float64(np.float32(by.temperature))
    kept = z > -np.inf
    if 0 < by.top_k < len(z):
        kept &= z >= np.sort(z)[-by.top_k]
    if by.top_p < 1:
        mass = np.where(kept, np.exp(scaled), 0.0)
        order = np.argsort(-z, kind="stable")
        cumulated = np.cumsum(mass[order])
        target = (np.float64(np.float32(by.top_p)) + margin) * cumulated[-1]
        last = min(int(np.searchsorted(cumulated, target)), int(kept.sum()) - 1)
        kept &= z >= z[order[last]]
    if by.min_p > 0:
        kept &= scaled >= math.log(np.float32(by.min_p))
    return set(np.flatnonzero(kept).tolist())


COMBINATIONS = [
    Filters(),
    Filters(top_k=1),
    Filters(top_k=7),
    Filters(top_k=1000),
    Filters(top_k=1_000_000),
    Filters(top_p=0.9),
    Filters(top_p=0.5, temperature=0.3),
    Filters(top_p=1e-6),
    Filters(top_p=0.999999),
    Filters(min_p=0.1),
    Filters(min_p=1.0),
    Filters(min_p=1e-6, temperature=3.0),
    Filters(top_k=40, top_p=0.8),
    Filters(top_k=3000, top_p=0.8, temperature=10.0),
    Filters(top_p=0.95, min_p=0.05),
    Filters(top_k=50, top_p=0.95, min_p=0.02, temperature=0.7),
    Filters(top_p=0.9, temperature=1e-45),
    Filters(top_k=20, top_p=0.9, temperature=100.0),
]
