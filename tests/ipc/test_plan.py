"""Plans and results survive their frames bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from albireo.ipc.plan import (
    FLAG_STOP,
    MAX_PLAN_COPIES,
    MAX_PLAN_EDITS,
    MAX_PLAN_GRAMMAR_WORDS,
    MAX_PLAN_SCORES,
    PLAN_HEADER,
    ROW_WORDS,
    SECTIONS,
    TAKE_MIN_P,
    TAKE_SEED_HI,
    TAKE_SEED_LO,
    TAKE_TEMPERATURE,
    TAKE_TOP_P,
    TAKE_WORDS,
    Int32Array,
    PlanSections,
    PlanView,
    ResultView,
    max_appends,
    plan_bytes,
    result_bytes,
    split64,
    write_plan,
    write_result,
)

MAX_SEQS, MAX_TOKENS, BLOCK, MAX_LEN = 4, 64, 16, 96
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
    return write_plan(frame, step, 0, PlanSections())


MOST_ROWS = {
    "take": MAX_SEQS,
    "append": max_appends(MAX_SEQS, MAX_TOKENS, BLOCK, MAX_LEN),
    "chunk": MAX_SEQS,
    "chunk_token": MAX_TOKENS,
    "decode": MAX_SEQS,
    "edit": MAX_PLAN_EDITS,
    "history": MAX_SEQS,
    "history_token": MAX_LEN,
    "grammar": MAX_SEQS,
    "grammar_word": MAX_PLAN_GRAMMAR_WORDS,
    "score": MAX_PLAN_SCORES,
    "copy": MAX_PLAN_COPIES,
}


@st.composite
def any_sections(draw: st.DrawFn) -> PlanSections:
    return PlanSections(
        *(
            draw(table(rows, width) if width > 1 else column(rows))
            for name, width in SECTIONS
            for rows in [min(MOST_ROWS[name], 40)]
        )
    )


@given(step=steps, flags=st.sampled_from([0, FLAG_STOP]), sections=any_sections())
@settings(deadline=None, derandomize=True)
def test_a_plan_within_the_budgets_comes_back_as_it_was(
    step: int, flags: int, sections: PlanSections
) -> None:
    frame = frame_of(plan_bytes(MAX_SEQS, MAX_TOKENS, BLOCK, MAX_LEN))
    length = write_plan(frame, step, flags, sections)
    assert length <= len(frame)
    assert bytes(frame[length:]) == bytes([GARBAGE]) * (len(frame) - length)
    plan = PlanView(frame[:length].toreadonly())
    assert (plan.step, plan.flags) == (step, flags)
    for (name, _), sent in zip(SECTIONS, sections, strict=True):
        got = getattr(plan, name)
        assert got.dtype == np.int32
        assert got.shape == sent.shape
        assert np.array_equal(got, sent)


def test_the_largest_plan_fills_its_frame() -> None:
    def full(rows: int, width: int) -> Int32Array:
        return np.full((rows, width) if width > 1 else rows, -1, np.int32)

    frame = frame_of(plan_bytes(MAX_SEQS, MAX_TOKENS, BLOCK, MAX_LEN))
    sections = PlanSections(*(full(MOST_ROWS[name], width) for name, width in SECTIONS))
    assert write_plan(frame, 1, 0, sections) == len(frame)
    larger = sections._replace(decode=full(MAX_SEQS + 1, 1))
    with pytest.raises(ValueError, match=f"{len(frame) + 4} bytes does not fit a frame of"):
        write_plan(frame, 2, 0, larger)
    assert PlanView(frame).step == 1  # the failed one has not touched it


@given(seed=st.integers(-(2**63), 2**64 - 1), floats=st.lists(st.floats(width=32), min_size=3))
@settings(deadline=None, derandomize=True)
def test_seeds_and_floats_keep_every_bit(seed: int, floats: list[float]) -> None:
    take = np.zeros((1, TAKE_WORDS), np.int32)
    take[0, [TAKE_SEED_LO, TAKE_SEED_HI]] = split64(seed)
    places = [TAKE_TEMPERATURE, TAKE_TOP_P, TAKE_MIN_P]
    sent = np.array(floats[:3], np.float32)
    take[0, places] = sent.view(np.int32)
    frame = frame_of(plan_bytes(MAX_SEQS, MAX_TOKENS, BLOCK, MAX_LEN))
    write_plan(frame, 5, 0, PlanSections(take=take))
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
    frame = frame_of(plan_bytes(MAX_SEQS, MAX_TOKENS, BLOCK, MAX_LEN))
    with pytest.raises(ValueError, match="not a plan: magic"):
        PlanView(frame)
    empty_plan(3, frame)
    with pytest.raises(ValueError, match="not a result: magic"):
        ResultView(frame)
    write_result(frame, 3, np.empty((0, ROW_WORDS), np.int32), 0, 0)
    with pytest.raises(ValueError, match="not a plan: magic"):
        PlanView(frame)


def test_an_empty_plan_is_its_header() -> None:
    frame = frame_of(plan_bytes(MAX_SEQS, MAX_TOKENS, BLOCK, MAX_LEN))
    assert empty_plan(9, frame) == PLAN_HEADER * 4
    plan = PlanView(frame[: PLAN_HEADER * 4])
    assert plan.step == 9
    assert plan.take.shape == (0, TAKE_WORDS)
    assert plan.decode.shape == (0,)
