"""What tests of decisions about GPUs share."""

from __future__ import annotations

import pytest

from albireo.node import gpus


@pytest.fixture
def cuda_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were what compiles kernels of CUDA C++."""
    monkeypatch.setattr(gpus, "has_bindings", lambda: True)
