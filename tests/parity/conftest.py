"""transformers' demo model, read once for all tests of this folder: that takes ten seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from ..reference import load_reference


@pytest.fixture(scope="package")
def reference(demo_model_path: Path) -> PreTrainedModel:
    return load_reference(demo_model_path)
