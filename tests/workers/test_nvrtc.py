"""What is kept of compiled kernels, without a GPU."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from albireo.workers.kernels.cuda import needs, nvrtc


def test_a_kernel_is_kept_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "nvrtc" / "kernel.cubin"
    nvrtc._keep(path, b"code")
    assert path.read_bytes() == b"code"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nvrtc.os, "replace", full)
    with caplog.at_level(logging.WARNING):
        nvrtc._keep(path.with_name("other.cubin"), b"more")
    assert "could not be kept" in caplog.text
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("there", [(), ("cuda",), ("cuda", "cuda.bindings")])
def test_without_the_bindings_there_is_no_compiler(
    there: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_spec(name: str) -> object:
        if "." in name and name.rpartition(".")[0] not in there:
            raise ModuleNotFoundError(name)  # As importlib does.
        return object() if name in there else None

    monkeypatch.setattr(nvrtc.torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(needs.importlib.util, "find_spec", find_spec)
    assert nvrtc.available(torch.device("cuda", 0)) == (len(there) == 2)


def test_what_is_kept_and_damaged_is_compiled_anew_where_it_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a driver and a compiler in place of NVIDIA's."""
    success = SimpleNamespace(NVRTC_SUCCESS=0)
    compiler = SimpleNamespace(
        nvrtcVersion=lambda: (0, 13, 0),
        nvrtcCreateProgram=lambda *_: (0, "program"),
        nvrtcCompileProgram=lambda *_: (0,),
        nvrtcResult=success,
        nvrtcGetCUBINSize=lambda _: (0, 5),
        nvrtcGetCUBIN=lambda program, code: (0,),
        nvrtcDestroyProgram=lambda _: (0,),
    )
    driver = SimpleNamespace(
        cuModuleLoadData=lambda code: (0, "module") if code == bytes(5) else (200, None)
    )
    bindings = ModuleType("cuda.bindings")
    vars(bindings).update(nvrtc=compiler, driver=driver)
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(nvrtc, "cache_dir", lambda: tmp_path)
    assert nvrtc._loaded("text", ()) == "module"
    (kept,) = (tmp_path / "nvrtc").iterdir()
    kept.write_bytes(b"damaged")

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(nvrtc.tempfile, "mkstemp", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    assert nvrtc._loaded("text", ()) == "module"
