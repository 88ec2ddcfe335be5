"""Machine code on disk is run for as long as it is that of its sources, and no longer."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path
from types import ModuleType

import numba
import numpy as np
import pytest

from albireo.ipc import plan
from albireo.workers import machine_code, sampling
from albireo.workers.kernels import cpu

KERNEL = """
from albireo.ipc.plan import ROW_NOTHING_ALLOWED
from albireo.workers.machine_code import native

@native("int64()")
def nothing_allowed():
    return ROW_NOTHING_ALLOWED
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the test writes kernels, with a cache of their own."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    monkeypatch.syspath_prepend(kernels)
    yield kernels
    sys.modules.pop("a_kernel", None)


def in_a_new_process() -> ModuleType:
    """The kernel's module as a process finds it that starts now."""
    sys.modules.pop("a_kernel", None)
    machine_code._digest.cache_clear()
    return importlib.import_module("a_kernel")


def test_code_goes_with_the_constants_it_was_compiled_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a_kernel.py").write_text(KERNEL)
    assert in_a_new_process().nothing_allowed() == plan.ROW_NOTHING_ALLOWED
    again = in_a_new_process().nothing_allowed
    assert again() == plan.ROW_NOTHING_ALLOWED
    assert sum(again.stats.cache_hits.values()) == 1
    monkeypatch.setattr(plan, "ROW_NOTHING_ALLOWED", 77)
    assert in_a_new_process().nothing_allowed() == 77


@pytest.mark.parametrize("package", [cpu, sampling], ids=["kernels/cpu", "sampling"])
def test_every_constant_from_elsewhere_is_in_the_digest(package: ModuleType) -> None:
    """Only int and float can be told apart by their values."""
    (folder,) = package.__path__
    for path in Path(folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            source = resolve_name("." * node.level + (node.module or ""), package.__name__)
            if source.startswith(package.__name__):
                continue
            module = importlib.import_module(source)
            for name in (alias.name for alias in node.names):
                if isinstance(getattr(module, name), int | float | str | tuple | np.ndarray):
                    where = f"{path.name} imports {name} from {source}"
                    assert module in machine_code.FROZEN_IN, where
                    assert isinstance(getattr(module, name), int | float), where


LAYERS = """
import sys, torch
from albireo.workers.kernels import create
for name in sys.argv[1:]:
    kernels, x = create("cpu", getattr(torch, name), False), torch.arange(12.0).view(3, 4)
    kernels.silu_mul(x.to(kernels.dtype))
    packed = kernels.pack_linear(torch.ones(1, 4, dtype=kernels.dtype), None)
    print(*kernels.linear(x.to(kernels.dtype), packed).flatten().tolist())
"""
"""What all dtypes share is compiled before the first layer is."""


def test_code_of_two_processes_is_not_mixed_up_in_a_third(tmp_path: Path) -> None:
    """Each dtype's layer is compiled in a process of its own, where its parts get equal numbers."""

    def run(text: str, *names: str) -> list[str]:
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", text, *names]
        ended = subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment
        )  # fmt: skip
        return ended.stdout.splitlines()

    run(LAYERS.partition("    packed")[0], "float32", "bfloat16")
    right = "6.0 22.0 38.0"
    assert run(LAYERS, "float32") == [right]
    assert run(LAYERS, "bfloat16") == [right]
    assert run(LAYERS, "float32", "bfloat16") == [right, right]
