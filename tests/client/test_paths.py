"""Where sockets, logs and caches are, and what moves them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from albireo.ipc import paths
from albireo.ipc.paths import PathError

NAMES = [*paths.VARIABLES, "XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_CACHE_HOME"]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_defaults(tmp_path: Path) -> None:
    root = Path(f"/tmp/albireo-{os.getuid()}")
    assert paths.runtime_root() == root
    assert paths.node_dir() == root / "default"
    assert paths.api_socket("work") == root / "work" / "api.sock"
    assert paths.state_dir() == tmp_path / ".local/state/albireo"
    assert paths.log_path("work") == tmp_path / ".local/state/albireo/work.log"
    assert paths.cache_dir() == tmp_path / ".cache/albireo"


def test_the_session_s_directories_are_used_where_they_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.setenv("XDG_STATE_HOME", "relative/is/ignored")
    assert paths.runtime_root() == tmp_path / "albireo"
    assert paths.cache_dir() == Path("/somewhere/albireo")
    assert paths.state_dir() == tmp_path / ".local/state/albireo"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    assert paths.runtime_root() == Path(f"/tmp/albireo-{os.getuid()}")


def test_our_own_variables_win_and_must_be_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    finders = {
        "ALBIREO_RUNTIME_DIR": paths.runtime_root,
        "ALBIREO_STATE_DIR": paths.state_dir,
        "ALBIREO_CACHE_DIR": paths.cache_dir,
    }
    assert set(finders) == set(paths.VARIABLES)
    for name, find in finders.items():
        monkeypatch.setenv(name, "/chosen")
        assert find() == Path("/chosen")
        monkeypatch.setenv(name, "not/absolute")
        with pytest.raises(PathError, match=f"{name} must be an absolute path"):
            find()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "x" * 33, "a b", "ä"])
def test_names_that_cannot_be_part_of_a_path(name: str) -> None:
    with pytest.raises(PathError, match="cannot name a node"):
        paths.node_dir(name)


def test_a_path_that_is_too_long_for_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    # The longest is <root>/n/router.zmq: 13 bytes behind the root.
    monkeypatch.setenv("ALBIREO_RUNTIME_DIR", "/" + "x" * 93)
    assert paths.node_dir("n")
    monkeypatch.setenv("ALBIREO_RUNTIME_DIR", "/" + "x" * 94)
    with pytest.raises(PathError, match="108 bytes; the system allows 107"):
        paths.node_dir("n")


def test_a_directory_in_tmp_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o700)
    paths._require_own(mine)
    mine.chmod(0o777)
    with pytest.raises(PathError, match="mode 777"):
        paths._require_own(mine)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(PathError, match="ALBIREO_RUNTIME_DIR"):
        paths._require_own(link)
