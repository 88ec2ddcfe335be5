"""Plans and results survive their frames bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from albireo.ipc.plan import (
    APPEND_WORDS,
    CHUNK_WORDS,
    FLAG_STOP,
    PLAN_HEADER,
    ROW_WORDS,
    TAKE_MIN_P,
    TAKE_SEED_HI,
    TAKE_SEED_LO,
    TAKE_TEMPERATURE,
    TAKE_TOP_P,
    TAKE_WORDS,
    Int32Array,
    PlanView,
    ResultView,
    plan_bytes,
    result_bytes,
    split64,
    write_plan,
    write_result,
)

MAX_SEQS, MAX_TOKENS, BLOCK = 4, 64, 16
GARBAGE = 0xA5
any_int32 = st.integers(-(2**31), 2**31 - 1)
steps = st.one_of(st.integers(0, 2**63 - 1), st.sampled_from([2**31, 2**32 - 1, 2**32, 2**63 - 1]))


def table(max_rows: int, width: int) -> st.SearchStrategy[Int32Array]:
    shapes = st.integers(0, max_rows).map(lambda rows: (rows, width))
    return arrays.arrays(np.int32, shapes, elements=any_int32)


def column(max_rows: int) -> st.SearchStrategy[Int32Array]:
    return arrays.arrays(np.int32, st.integers(0, max_rows), elements=any_int32)


def frame_of(nbytes: int) -> memoryview:
    """A frame with what an earlier message left in it."""
    return memoryview(bytearray([GARBAGE]) * nbytes)


def empty_plan(step: int, frame: memoryview) -> int:
    def none(width: int) -> Int32Array:
        return np.empty((0, width), np.int32)

    nothing = np.empty(0, np.int32)
    return write_plan(
        frame, step, 0, none(TAKE_WORDS), none(APPEND_WORDS), none(CHUNK_WORDS), nothing, nothing
    )


@given(
    step=steps,
    flags=st.sampled_from([0, FLAG_STOP]),
    take=table(MAX_SEQS, TAKE_WORDS),
    append=table(MAX_SEQS * 2 + MAX_TOKENS // BLOCK + 1, APPEND_WORDS),
    chunk=table(MAX_SEQS, CHUNK_WORDS),
    chunk_token=column(MAX_TOKENS),
    decode=column(MAX_SEQS),
)
@settings(deadline=None, derandomize=True)
def test_a_plan_within_the_budgets_comes_back_as_it_was(
    step: int,
    flags: int,
    take: Int32Array,
    append: Int32Array,
    chunk: Int32Array,
    chunk_token: Int32Array,
    decode: Int32Array,
) -> None:
    frame = frame_of(plan_bytes(MAX_SEQS, MAX_TOKENS, BLOCK))
    length = write_plan(frame, step, flags, take, append, chunk, chunk_token, decode)
    assert length <= len(frame)
    assert bytes(frame[length:]) == bytes([GARBAGE]) * (len(frame) - length)
    plan = PlanView(frame[:length].toreadonly())
    assert (plan.step, plan.flags) == (step, flags)
    for got, sent in (
        (plan.take, take),
        (plan.append, append),
        (plan.chunk, chunk),
        (plan.chunk_token, chunk_token),
        (plan.decode, decode),
    ):
        assert got.dtype == np.int32
        assert got.shape == sent.shape
        assert np.array_equal(got, sent)


def test_the_largest_plan_fills_its_frame() -> None:
    def full(rows: int, width: int) -> Int32Array:
        return np.full((rows, width), -1, np.int32)

    frame = frame_of(plan_bytes(MAX_SEQS, MAX_TOKENS, BLOCK))
    appends = MAX_SEQS * 2 + MAX_TOKENS // BLOCK + 1
    sections = (
        full(MAX_SEQS, TAKE_WORDS),
        full(appends, APPEND_WORDS),
        full(MAX_SEQS, CHUNK_WORDS),
        np.full(MAX_TOKENS, -1, np.int32),
        np.full(MAX_SEQS, -1, np.int32),
    )
    assert write_plan(frame, 1, 0, *sections) == len(frame)
    larger = (*sections[:4], np.full(MAX_SEQS + 1, -1, np.int32))
    with pytest.raises(ValueError, match=f"{len(frame) + 4} bytes does not fit a frame of"):
        write_plan(frame, 2, 0, *larger)
    assert PlanView(frame).step == 1  # the failed one has not touched it


@given(seed=st.integers(-(2**63), 2**64 - 1), floats=st.lists(st.floats(width=32), min_size=3))
@settings(deadline=None, derandomize=True)
def test_seeds_and_floats_keep_every_bit(seed: int, floats: list[float]) -> None:
    take = np.zeros((1, TAKE_WORDS), np.int32)
    take[0, [TAKE_SEED_LO, TAKE_SEED_HI]] = split64(seed)
    places = [TAKE_TEMPERATURE, TAKE_TOP_P, TAKE_MIN_P]
    sent = np.array(floats[:3], np.float32)
    take[0, places] = sent.view(np.int32)
    frame = frame_of(plan_bytes(MAX_SEQS, MAX_TOKENS, BLOCK))
    nothing = np.empty(0, np.int32)
    write_plan(
        frame, 5, 0, take, nothing.reshape(0, APPEND_WORDS), nothing.reshape(0, CHUNK_WORDS),
        nothing, nothing,
    )  # fmt: skip
    row = PlanView(frame).take[0]
    low, high = int(row[TAKE_SEED_LO]), int(row[TAKE_SEED_HI])
    assert ((high & 0xFFFFFFFF) << 32 | (low & 0xFFFFFFFF)) == seed % 2**64
    assert row[places].view(np.float32).tobytes() == sent.tobytes()


@given(
    step=steps,
    rows=table(MAX_SEQS, ROW_WORDS),
    step_us=st.integers(0, 2**31 - 1),
    forward_us=st.integers(0, 2**31 - 1),
)
@settings(deadline=None, derandomize=True)
def test_a_result_comes_back_as_it_was(
    step: int, rows: Int32Array, step_us: int, forward_us: int
) -> None:
    frame = frame_of(result_bytes(MAX_SEQS))
    length = write_result(frame, step, rows, step_us, forward_us)
    assert bytes(frame[length:]) == bytes([GARBAGE]) * (len(frame) - length)
    result = ResultView(frame[:length].toreadonly())
    assert (result.step, result.step_us, result.forward_us) == (step, step_us, forward_us)
    assert result.rows.shape == rows.shape
    assert np.array_equal(result.rows, rows)


def test_one_is_not_taken_for_the_other() -> None:
    frame = frame_of(plan_bytes(MAX_SEQS, MAX_TOKENS, BLOCK))
    with pytest.raises(ValueError, match="not a plan: magic"):
        PlanView(frame)
    empty_plan(3, frame)
    with pytest.raises(ValueError, match="not a result: magic"):
        ResultView(frame)
    write_result(frame, 3, np.empty((0, ROW_WORDS), np.int32), 0, 0)
    with pytest.raises(ValueError, match="not a plan: magic"):
        PlanView(frame)


def test_an_empty_plan_is_its_header() -> None:
    frame = frame_of(plan_bytes(MAX_SEQS, MAX_TOKENS, BLOCK))
    assert empty_plan(9, frame) == PLAN_HEADER * 4
    plan = PlanView(frame[: PLAN_HEADER * 4])
    assert plan.step == 9
    assert plan.take.shape == (0, TAKE_WORDS)
    assert plan.decode.shape == (0,)
