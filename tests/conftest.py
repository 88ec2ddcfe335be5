"""Fixtures that several folders of tests share: a tiny model, the demo model, real nodes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from albireo.ipc.paths import cache_dir
from albireo.node.events import NodeFailed
from albireo.node.launch import run_detached, stop_node
from albireo.node.options import NodeOptions
from albireo.node.runtime_dir import is_running

from .tiny_model import write_tiny_model

# Before anything imports numba or PyTorch.  Kernels that tests call lie where nodes find them,
# too, and are compiled once for both.  Where tests run side by side, threads that spin at the
# barriers of tiny products would take the cores that the others need.
os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_dir() / "numba"))
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """The demo model's file, fetched when it is not in the cache."""
    chosen = os.environ.get("ALBIREO_DEMO_MODEL")
    if chosen:
        return Path(chosen)
    from albireo.node.demo_model import FetchError, fetch_demo_model

    try:
        return fetch_demo_model()
    except FetchError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a two-layer Llama's config and a byte-level tokenizer; no weights.

    For `--load-format dummy`, and for the sim device.  Its shapes divide by 1 and 3.
    """
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    return path


def _make_home(paths: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> Path:
    home = paths.mktemp("n")
    patch.setenv("ALBIREO_RUNTIME_DIR", str(home / "run"))
    patch.setenv("ALBIREO_STATE_DIR", str(home / "state"))
    return home


@pytest.fixture
def node_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runtime and state directories of this test's own; the cache is shared."""
    return _make_home(tmp_path_factory, monkeypatch)


@pytest.fixture(scope="module")
def module_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same, of a module's nodes.  `run` and `state` in it are empty when nothing is left."""
    with pytest.MonkeyPatch.context() as patch:
        yield _make_home(tmp_path_factory, patch)


@pytest.fixture
def start_node(node_home: Path) -> Iterator[Callable[..., str]]:
    """start_node(**NodeOptions fields) -> name; stopped at the end of the test."""
    with _starting(node_home) as start:
        yield start


@pytest.fixture(scope="module")
def start_shared_node(module_home: Path) -> Iterator[Callable[..., str]]:
    """The same, of nodes that all tests of a module use, and none disturbs."""
    with _starting(module_home) as start:
        yield start


@contextlib.contextmanager
def _starting(home: Path) -> Iterator[Callable[..., str]]:
    """As start_node, of nodes whose logs are in `home`."""
    names: list[str] = []

    def start(**fields: object) -> str:
        options = NodeOptions(**fields)  # type: ignore[arg-type]
        failures: list[str] = []
        names.append(options.name)
        status = run_detached(
            options, lambda e: failures.append(e.reason) if isinstance(e, NodeFailed) else None
        )
        if status != 0:
            log = home / "state" / f"{options.name}.log"
            text = log.read_text() if log.exists() else "(no log)"
            raise AssertionError(f"the node did not start: {failures}\n{text[-4000:]}")
        return options.name

    yield start
    for name in names:
        if is_running(name):
            with contextlib.suppress(Exception):
                stop_node(name, now=True, timeout_s=20)
