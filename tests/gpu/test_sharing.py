"""Which GPU a test process sees.  Needs none, and runs where there is none."""

from __future__ import annotations

import pytest

from .conftest import gpu_of


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["0", "0", "1", "1", "2", "2"]),
        ("3,5,7", ["3", "3", "5", "5", "7", "7"]),
        ("GPU-a,GPU-b", ["GPU-a", "GPU-a", "GPU-b", "GPU-b", "GPU-a", "GPU-a"]),
        ("4", ["4"] * 6),
        ("", [None] * 6),
    ],
)
def test_six_processes(visible: str | None, expected: list[str | None]) -> None:
    assert [gpu_of(f"gw{n}", visible) for n in range(6)] == expected


def test_a_process_alone_sees_what_it_is_given() -> None:
    assert gpu_of("", "0,1") is gpu_of("", None) is gpu_of("master", "1") is None
