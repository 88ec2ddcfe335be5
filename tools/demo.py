"""`make demo`: a node with two groups answers a question, shows its status, and is gone.

Everything it makes besides the cached model is in a temporary directory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ALBIREO = [str(Path(sys.executable).with_name("albireo"))]
QUESTION = "Why is the sky blue? Answer in two sentences."


def main() -> int:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="albireo-demo-") as scratch:
        os.environ["ALBIREO_RUNTIME_DIR"] = f"{scratch}/run"
        os.environ["ALBIREO_STATE_DIR"] = f"{scratch}/state"
        run("node", "start", "--model", "demo", "--groups", "2x1", "--detach")
        try:
            run("chat", "--message", QUESTION, "--max-tokens", "80", "--temperature", "0")
            run("generate", "The capital of France is", "--max-tokens", "16", "--temperature", "0")
            run("node", "status")
        finally:
            run("node", "stop")
        left = [str(path) for path in Path(scratch).rglob("*") if path.is_socket()]
        if left:
            print(f"left behind: {left}", file=sys.stderr)
            return 1
    print(f"demo done in {time.monotonic() - began:.1f} s")
    return 0


def run(*words: str) -> None:
    """Shows the command as a user would type it, and runs it."""
    print(f"\n$ albireo {' '.join(repr(w) if ' ' in w else w for w in words)}", flush=True)
    subprocess.run([*ALBIREO, *words], check=True)


if __name__ == "__main__":
    sys.exit(main())
