"""Kernels of CUDA C++ on the CPU: warps_on_cpu.h in place of the instructions of a GPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_BEGIN = "// ---------------------------------------------------------------- instructions\n"
_NEXT = "// ---------------------------------------------------------------- "


class KernelOnCpu:
    """As nvrtc.CompiledKernel, where its class has a folder to compile in.

    last_first: programs run in the order of the grid, or against it.
    """

    folder: Path
    last_first = False

    def __init__(
        self, source: str, defines: list[str], name: str, threads: int, shared_bytes: int,
        cluster: tuple[int, int, int],
    ) -> None:  # fmt: skip
        assert cluster == (1, 1, 1)
        before, _, rest = source.partition(_BEGIN)
        text = before + rest[rest.index(_NEXT) :].replace("extern __shared__ float4 memory[];", "")
        signature = re.search(rf"{name}\((.*?)\) {{", text, re.DOTALL)
        assert signature
        names = [re.split(r"[ *]", each)[-1] for each in signature[1].split(",")]
        text += f"""
        extern "C" const char* run(int x, int y, int z, int last_first, {signature[1]}) {{
            const Place grid{{unsigned(x), unsigned(y), unsigned(z)}};
            return run_grid(grid, {threads}, {shared_bytes}, last_first,
                            [=] {{ {name}({", ".join(names)}); }});
        }}"""
        head = Path(__file__).with_name("warps_on_cpu.h").read_text()
        stem = self.folder / "_".join([name, *(define.split("=")[1] for define in defines)])
        stem.with_suffix(".cpp").write_text(head + text)
        subprocess.run(
            ["g++", "-O1", "-std=c++17", "-fno-strict-aliasing", "-w", "-shared", "-fPIC",
             *(f"-D{define}" for define in defines),
             "-o", stem.with_suffix(".so"), stem.with_suffix(".cpp")],
            check=True,
        )  # fmt: skip
        self._run = ctypes.CDLL(str(stem.with_suffix(".so"))).run
        self._run.restype = ctypes.c_char_p

    def launch(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        failure = self._run(*map(ctypes.c_int, (*grid, self.last_first)), *arguments)
        assert failure is None, failure.decode()


@contextmanager
def kernels_on_cpu(module: ModuleType, folder: Path) -> Iterator[None]:
    """Those that the module's _kernel() keeps are compiled in the folder; without g++ a test that
    asks for it is skipped."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelOnCpu, "folder", folder, raising=False)
        patch.setattr(module, "CompiledKernel", KernelOnCpu)
        module._kernel.cache_clear()
        yield
    module._kernel.cache_clear()
