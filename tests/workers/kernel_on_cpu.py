"""Kernels of CUDA C++ on the CPU: warps_on_cpu.h in place of the instructions of a GPU."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path
from typing import Any

_BEGIN = "// ---------------------------------------------------------------- instructions\n"
_NEXT = "// ---------------------------------------------------------------- "


class KernelOnCpu:
    """As nvrtc.CompiledKernel, where its class has a folder to compile in."""

    folder: Path

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
        extern "C" void run(int x, int y, int z, {signature[1]}) {{
            run_grid({{unsigned(x), unsigned(y), unsigned(z)}}, {threads},
                     [=] {{ {name}({", ".join(names)}); }});
        }}"""
        head = Path(__file__).with_name("warps_on_cpu.h").read_text()
        stem = self.folder / "_".join([name, *(define.split("=")[1] for define in defines)])
        stem.with_suffix(".cpp").write_text(head + text)
        subprocess.run(
            ["g++", "-O1", "-std=c++17", "-w", "-shared", "-fPIC", *(f"-D{d}" for d in defines),
             "-o", stem.with_suffix(".so"), stem.with_suffix(".cpp")],
            check=True,
        )  # fmt: skip
        self._run = ctypes.CDLL(str(stem.with_suffix(".so"))).run

    def launch(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        self._run(*map(ctypes.c_int, grid), *arguments)
