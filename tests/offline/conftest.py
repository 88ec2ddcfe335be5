"""Runtime and state directories for a module's nodes, short enough for sockets."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """Its folders `run` and `state` are empty when nothing of any node is left."""
    path = Path(tempfile.mkdtemp(prefix="alb"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALBIREO_RUNTIME_DIR", str(path / "run"))
        patch.setenv("ALBIREO_STATE_DIR", str(path / "state"))
        yield path
    shutil.rmtree(path)
