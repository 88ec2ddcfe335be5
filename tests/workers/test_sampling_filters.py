"""Which tokens may be drawn: top-k, top-p and min-p against a sort in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo.workers.sampling import filters
from albireo.workers.sampling.filters import BLOCK, BUCKETS

from .sampling_reference import COMBINATIONS, Filters, reference_kept


def kept_tokens(logits: np.ndarray, by: Filters) -> set[int]:
    """What the filters keep, as the kernel decides it."""
    row = np.ascontiguousarray(logits, np.float32)
    block_max = np.empty(-(-len(row) // BLOCK), np.float32)
    assert filters.scan_row(row, block_max) == filters.SOUND
    best = np.float64(row[filters.first_best(row, block_max)])
    threshold = filters.keep_threshold(
        row,
        block_max,
        best,
        np.float64(np.float32(by.temperature)),
        np.int32(by.top_k),
        np.float32(by.top_p),
        np.float32(by.min_p),
        np.empty(len(row), np.float32),
        np.empty(len(row), np.int64),
        np.empty(BUCKETS, np.int64),
    )
    return set(np.flatnonzero(row.astype(np.float64) >= threshold).tolist())


def assert_kept_as_reference(logits: np.ndarray, by: Filters) -> None:
    kept = kept_tokens(logits, by)
    # Rounding may move a sum that is within 1e-7 of top_p; nothing else.
    assert reference_kept(logits, by, -1e-7) <= kept <= reference_kept(logits, by, 1e-7)
    assert kept


def adversarial_rows() -> dict[str, np.ndarray]:
    random = np.random.default_rng(11)
    size = 5000
    normal = random.normal(0, 4, size)
    masked = normal.copy()
    masked[random.random(size) < 0.9] = -np.inf
    only_one = np.full(size, -np.inf)
    only_one[4321] = -7.0
    one_huge = normal.copy()
    one_huge[1234] = 3e38
    return {
        "normal": normal,
        "few distinct values": np.round(normal),
        "all equal": np.full(size, 1.5),
        "one huge": one_huge,
        "both ends of float32": np.where(np.arange(size) % 2, 3.4e38, -3.4e38),
        "mostly -inf": masked,
        "one finite": only_one,
        "signed zeros": np.where(np.arange(size) % 3, -0.0, 0.0),
        "two clusters": np.where(np.arange(size) < 2500, 1e-3, 0.0) * random.random(size),
        "ascending": np.linspace(-20, 20, size),
        "descending": np.linspace(20, -20, size),
        "flat": normal * 1e-6,
        "denormal": random.integers(0, 100, size) * 1e-44,
        "one token": np.zeros(1),
        "one block and one": random.normal(0, 2, BLOCK + 1),
        "as many as a block": random.normal(0, 2, BLOCK),
    }


@pytest.mark.parametrize("name", adversarial_rows())
@pytest.mark.parametrize("by", COMBINATIONS, ids=str)
def test_filters_keep_what_a_sort_keeps(name: str, by: Filters) -> None:
    assert_kept_as_reference(adversarial_rows()[name], by)


logits_arrays = st.one_of(
    st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=400),
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=400),
    st.lists(st.sampled_from([-math.inf, -1e30, 0.0, 1.0, 1e30]), min_size=1, max_size=200),
).filter(lambda row: max(row) > -math.inf)


@settings(max_examples=300, deadline=None)
@given(
    logits=logits_arrays,
    temperature=st.sampled_from([1e-30, 0.1, 0.7, 1.0, 2.0, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 3, 10, 100, 399]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 1e-3, 0.1, 0.5, 1.0]),
)
def test_filters_keep_what_a_sort_keeps_for_any_row(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    assert_kept_as_reference(np.array(logits), Filters(temperature, top_k, top_p, min_p))


def test_mass_is_the_exponential_in_fixed_point() -> None:
    for scaled in np.append(np.linspace(filters.NEGLIGIBLE, 0, 20_001), -1e-300):
        exact = math.exp(scaled) * 2**filters.MASS_BITS
        assert abs(filters.token_mass(scaled) - (exact - 0.5)) <= 0.5 + exact * 1e-15
    assert filters.token_mass(0.0) == 2**filters.MASS_BITS


def test_ties_are_kept_together() -> None:
    row = np.array([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    assert kept_tokens(row, Filters(top_k=2)) == {1, 2, 3, 4}
    assert kept_tokens(row, Filters(top_p=0.5)) == {1, 2, 3, 4}
    assert kept_tokens(np.zeros(1000), Filters(top_p=0.01)) == set(range(1000))


def test_top_p_counts_the_mass_of_what_top_k_left() -> None:
    # Of 0.4, 0.3, 0.2, 0.1 top-2 leaves 4/7 and 3/7: 0.55 is reached by the first alone.
    row = np.log([0.4, 0.3, 0.2, 0.1])
    assert kept_tokens(row, Filters(top_p=0.55)) == {0, 1}
    assert kept_tokens(row, Filters(top_k=2, top_p=0.55)) == {0}


@pytest.mark.parametrize("by", COMBINATIONS, ids=str)
def test_the_order_of_the_vocabulary_does_not_matter(by: Filters) -> None:
    random = np.random.default_rng(5)
    row = np.round(random.normal(0, 4, 3000), 1)
    order = random.permutation(len(row))
    assert {int(order[i]) for i in kept_tokens(row[order], by)} == kept_tokens(row, by)
