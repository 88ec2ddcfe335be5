"""The examples of the clients in README.md, run as they stand against a node."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.mark.node
def test_the_examples_work(start_node: Callable[..., str], tiny_model_dir: Path) -> None:
    start_node(
        name="default", device="sim", sim_step_ms=1.0, model=str(tiny_model_dir), chat_template="{{"
        " messages[0].content }}",
    )  # fmt: skip
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    examples = [block for block in blocks if "Client.connect(" in block]
    assert len(examples) == 2
    for example in examples:
        done = subprocess.run(
            [sys.executable, "-c", example], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout
