"""The example of `LLM` in README.md, run as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.mark.node
@pytest.mark.demo
def test_the_example_works(module_home: Path, demo_model_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    (example,) = [block for block in blocks if "LLM(" in block]
    done = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout and len(done.stdout.splitlines()) >= 3
    assert not list((module_home / "run").iterdir())
