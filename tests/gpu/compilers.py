"""What is compiled while a test runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import triton

from albireo.workers.kernels.cuda import nvrtc


def watch_compilers(monkeypatch: pytest.MonkeyPatch, note: Callable[[str], None]) -> None:
    """note: gets a word on each kernel that is compiled from now on, or read from what is kept."""
    really_compiled = nvrtc.compiled

    def compiled(source: str, defines: Sequence[str], anew: bool = False) -> nvrtc.Code:
        note(str(defines))
        return really_compiled(source, defines, anew)

    monkeypatch.setattr(nvrtc, "compiled", compiled)
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **found: note(found["repr"])
    )
