"""Triton's interpreter, for tests of the GPU's kernels on machines without one.

Import this before any module with Triton kernels: Triton looks at its
environment as it is imported, and each kernel is interpreted or not from then on.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import pytest


def use_interpreter() -> None:
    """Skips the calling test module where kernels cannot be interpreted, or need not be."""

    def skip(reason: str) -> None:
        pytest.skip(reason, allow_module_level=True)

    if importlib.util.find_spec("triton") is None:
        skip("no Triton, which the CPU's requirements leave out: these tests run where it is")
    import torch

    if torch.cuda.is_available():
        skip("a GPU is here: tests/gpu runs the kernels for real")
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        skip("Triton was imported before: run this file alone, or set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"
    _let_tensors_be_indices()
    _compute_as_a_gpu_does()


def _let_tensors_be_indices() -> None:
    """Bounds of loops are arrays of one element, which NumPy 2.4 no longer takes for integers."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    if patch.__module__ != interpreter.__name__:
        return

    def patch_more(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_more


def _compute_as_a_gpu_does() -> None:
    """Rounds to bfloat16, and multiplies it; a row of a product does not depend on its place.

    The interpreter keeps bfloat16 as bits, which it cuts off and multiplies as
    integers; NumPy's own product sums in another order at the edge of a matrix.
    """
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    if convert.__module__ != interpreter.__name__:
        return

    def widened(bits: Any) -> Any:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def convert_better(data: Any, from_type: Any, to_type: Any, rounding: Any) -> Any:
        if (from_type, to_type) == (tl.float32, tl.bfloat16):
            rounded = torch.tensor(data).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)
        if (from_type, to_type) == (tl.bfloat16, tl.float32):
            return widened(data)
        return convert(data, from_type, to_type, rounding)

    def dot(self: Any, a: Any, b: Any, total: Any, *_: Any) -> Any:
        is_bits = a.dtype.scalar == tl.bfloat16
        left, right = (widened(x.data) if is_bits else x.data for x in (a, b))
        product = np.einsum("ik,kj->ij", left, right, optimize=False)
        return interpreter.TensorHandle(product + total.data, total.dtype.scalar)

    interpreter._convert_float = convert_better
    interpreter.InterpreterBuilder.create_dot = dot
