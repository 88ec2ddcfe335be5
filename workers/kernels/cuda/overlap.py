"""Programmatic dependent launch: a kernel's blocks come up while the kernel before still runs.

    kernel n     ──work──────────────────┐
    kernel n+1       start, weights ─ wait ┴─ input, work ──────┐
    kernel n+2                             start, weights ─ wait ┴─ ...

What a launch costs, and the first reads of weights, then lie beside the end of
the kernel before (CUDA programming guide, "Programmatic Dependent Launch";
Hopper and newer).  Two rules keep it sound:

- before `wait` a kernel reads nothing but what no kernel writes: weights.  The
  step's indices, and tables that a plan changes, are not of that kind, for
  several kernels can have come up at once;
- it writes nothing before `wait` either.

A kernel is over only when it has waited for those before, so `wait` means all
that were launched earlier in its stream, and what that has waited for, also where
cuBLAS, which does not take part, is between.  The launch says `**overlapped(device)`;
the kernel begins with `come_up`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_FIRST_CAPABILITY = (9, 0)
_APART: Mapping[str, Any] = {"OVERLAP": False}
_TOGETHER: Mapping[str, Any] = {"OVERLAP": True, "launch_pdl": True}


@triton.jit
def come_up(OVERLAP: tl.constexpr):
    """Lets the next kernel come up beside this one."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Returns when all kernels before have ended, and what they wrote is to be seen."""
    if OVERLAP:
        gdc_wait()


def overlapped(device: torch.device) -> Mapping[str, Any]:
    """Arguments of a launch on `device` whose kernel follows the rules above."""
    return _TOGETHER if can_overlap(device) else _APART


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Whether it is a GPU that knows it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY
