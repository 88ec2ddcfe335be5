"""What is kept of compiled kernels, without a GPU."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from albireo.workers.kernels.cuda import nvrtc


def test_a_kernel_is_kept_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "nvrtc" / "kernel.cubin"
    nvrtc._keep(path, b"code")
    assert path.read_bytes() == b"code"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nvrtc.os, "replace", full)
    with caplog.at_level(logging.WARNING):
        nvrtc._keep(path.with_name("other.cubin"), b"more")
    assert "could not be kept" in caplog.text
    assert list(path.parent.iterdir()) == [path]
