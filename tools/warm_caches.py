"""Compiles, on two cores, what all processes of the tests run: bytecode, and the CPU's kernels.

Each node would else compile the package's files again where Python may not write bytecode
(PYTHONDONTWRITEBYTECODE), and the first ones the same kernels side by side.  Quick when all
is there.
"""

from __future__ import annotations

import compileall
import subprocess
import sys
from pathlib import Path

from albireo.node.environment import child_environment

_ROOT = Path(__file__).parents[1]
_KERNELS = """
import torch
from albireo.workers.kernels import create
for dtype in (torch.bfloat16, torch.float32):
    create("cpu", dtype, False).warm_up()
"""
_SAMPLING = """
from albireo.workers.sampling.compiled import compile_all
compile_all()
"""


def main() -> int:
    for name in ("albireo", "ipc", "workers"):
        compileall.compile_dir(_ROOT / name, quiet=1)
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=child_environment("cpu"))
        for code in (_KERNELS, _SAMPLING)
    ]
    codes = [each.wait() for each in running]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
