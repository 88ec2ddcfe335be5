"""The curl examples of README.md's section "HTTP", run as they stand against a node."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from albireo.node.launch import stop_node

from .conftest import start_http_node

README = Path(__file__).resolve().parents[2] / "README.md"
_ADDRESS = "http://127.0.0.1:8000"
_SOCKET = re.compile(r"--unix-socket \S+")


def examples(text: str) -> list[str]:
    """The bash blocks with curl in them of the section "HTTP"."""
    section = re.search(r"^## HTTP$(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    if section is None:
        return []
    blocks = re.findall(r"^```bash\n(.*?)^```$", section[1], re.DOTALL | re.MULTILINE)
    return [each for each in blocks if "curl" in each]


@pytest.mark.node
def test_the_curl_examples_work(module_home: Path, tiny_model_dir: Path) -> None:
    found = examples(README.read_text())
    if not found:
        pytest.skip('README.md has no section "HTTP" with curl examples yet')
    node = start_http_node(
        module_home, name="readme", device="sim", sim_step_ms=1.0, model=str(tiny_model_dir)
    )
    try:
        for block in found:
            assert _ADDRESS in block or "--unix-socket" in block, block
            script = _SOCKET.sub(f"--unix-socket {node.uds}", block.replace(_ADDRESS, node.http))
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", script],
                capture_output=True, text=True, timeout=20,
            )  # fmt: skip
            assert done.returncode == 0, (block, done.stderr)
            assert done.stdout.strip() and '"error"' not in done.stdout, (block, done.stdout)
            if '"stream": true' in block:
                assert done.stdout.endswith("data: [DONE]\n\n")
    finally:
        stop_node(node.name, now=True)
