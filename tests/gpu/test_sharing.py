"""Which GPU a test process sees.  Needs none, and runs where there is none."""

from __future__ import annotations

import pytest

from .conftest import gpu_of


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["0", "1", "2"]),
        ("3,5,7", ["3", "5", "7"]),
        ("GPU-a,GPU-b", ["GPU-a", "GPU-b", "GPU-a"]),
        ("4", ["4", "4", "4"]),
        ("", [None, None, None]),
    ],
)
def test_three_times_four_processes(visible: str | None, expected: list[str | None]) -> None:
    assert [gpu_of(f"gw{n}", visible) for n in range(12)] == [e for e in expected for _ in range(4)]


def test_a_process_alone_sees_what_it_is_given() -> None:
    assert gpu_of("", "0,1") is gpu_of("", None) is gpu_of("master", "1") is None
