"""Starts that fail or are interrupted: what is said, and what is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from albireo.cli.display import StartDisplay
from albireo.cli.main import main
from albireo.ipc.paths import log_path, node_dir
from albireo.node.events import NodeReady
from albireo.node.launch import run_foreground
from albireo.node.options import NodeOptions
from albireo.node.owned import OwnedNode
from albireo.node.runtime_dir import RuntimeDir, is_running, read_facts

from .processes import alive, pids, wait_for, whole

ALBIREO = str(Path(sys.executable).with_name("albireo"))
SIM = ("node", "start", "--device", "sim")


@pytest.mark.node
@pytest.mark.parametrize("detach", [(), ("--detach",)])
@pytest.mark.parametrize(
    ("variable", "what"),
    [("ALBIREO_RUNTIME_DIR", "runtime directory"), ("ALBIREO_STATE_DIR", "log")],
)
def test_a_directory_that_is_none_is_named(
    node_home: Path, tiny_model_dir: Path, variable: str, what: str, detach: tuple[str, ...]
) -> None:
    file = node_home / "a-file"
    file.write_text("")
    words = [ALBIREO, *SIM, "--model", str(tiny_model_dir), *detach]
    done = subprocess.run(
        words, env=os.environ | {variable: str(file)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert f"the node's {what} {file}" in said and f"{variable} names another" in said
    assert "Traceback" not in said


def test_the_demo_models_directory_too(node_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = node_home / "a-file"
    file.write_text("")
    monkeypatch.setenv("ALBIREO_CACHE_DIR", str(file / "below"))
    said: list[object] = []
    assert run_foreground(NodeOptions(device="sim"), said.append) == 1
    assert "the demo model cannot be kept in" in str(said) and "ALBIREO_CACHE_DIR" in str(said)


FAILING = """
import sys
from albireo.node.launch import run_foreground
from albireo.node.options import NodeOptions
from albireo.node.supervisor import Supervisor

async def fail(self):
    raise ZeroDivisionError("of all things")

Supervisor._live = fail
sys.exit(run_foreground(NodeOptions(name="odd", device="sim", model=sys.argv[1]), print))
"""


@pytest.mark.node
def test_what_nobody_expected_is_said(node_home: Path, tiny_model_dir: Path) -> None:
    """And nothing is left."""
    words = [sys.executable, "-c", FAILING, str(tiny_model_dir)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ZeroDivisionError: of all things (`albireo node logs --name odd`" in done.stdout
    assert "Traceback" in log_path("odd").read_text()
    assert not node_dir("odd").exists()


@pytest.mark.node
def test_an_interrupted_start_leaves_no_node(node_home: Path, tiny_model_dir: Path) -> None:
    words = [ALBIREO, *SIM, "--detach", "--name", "brief", "--model", str(tiny_model_dir)]
    # Who runs the tests in the background may have it ignored, in all below, too.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    wait_for("the node has a directory", lambda: is_running("brief"), 30)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in said
    assert not is_running("brief") and not node_dir("brief").exists()


@pytest.mark.node
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_so_does_one_that_is_killed(node_home: Path, tiny_model_dir: Path, how: int) -> None:
    words = [ALBIREO, *SIM, "--detach", "--name", "orphan", "--model", str(tiny_model_dir)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    wait_for("the node has a directory", lambda: is_running("orphan"), 30)
    process.send_signal(how)
    assert process.wait(60) == -how
    wait_for("the node has ended", lambda: not is_running("orphan"), 30)
    wait_for("the directory is gone", lambda: not node_dir("orphan").exists(), 5)


def test_a_node_that_is_starting_is_no_stranger(node_home: Path) -> None:
    mine = RuntimeDir.claim("slow")
    mine.write_facts({"name": "slow", "pid": 42, "state": "starting"})
    ended = CliRunner().invoke(main, ["node", "status", "--name", "slow"])
    assert ended.exit_code == 1
    assert "node 'slow' (pid 42) is starting: wait for its ready line" in ended.output
    mine.remove()
    ended = CliRunner().invoke(main, ["node", "status", "--name", "slow"])
    assert "no node named 'slow' is running" in ended.output


@pytest.mark.node
def test_a_killed_node_leaves_no_unix_socket(node_home: Path, tiny_model_dir: Path) -> None:
    uds = node_home / "u.sock"
    words = [*SIM, "--name", "gone", "--uds", str(uds), "--model", str(tiny_model_dir)]
    subprocess.run([ALBIREO, *words, "--detach"], check=True, capture_output=True, timeout=60)
    assert uds.is_socket()
    facts = json.loads((node_dir("gone") / "node.json").read_text())
    os.kill(facts["pid"], signal.SIGKILL)
    wait_for("the socket is gone", lambda: not uds.exists(), 10)
    wait_for("the directory is gone", lambda: not node_dir("gone").exists(), 5)


@pytest.mark.node
def test_what_a_start_took_its_time_for_is_kept(
    node_home: Path, tiny_model_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In node.json, of all that have phases; on the terminal of the one that took longest."""
    options = NodeOptions(name="took", model=str(tiny_model_dir), load_format="dummy", device="cpu")
    node = OwnedNode(options, lambda event: None)
    try:
        facts = read_facts("took")
    finally:
        node.stop()
    assert facts is not None and facts == node.facts
    assert list(facts["phases_s"]["g0.worker0"]) == ["making the KV cache", "warming up"]
    assert all(taken_s >= 0 for taken_s in facts["phases_s"]["g0.worker0"].values())
    facts["phases_s"] = {
        "g0.worker0": {"the weights": 2.04, "sampling": 0.01, "CUDA graphs": 3.0},
        "g0.worker1": {"the weights": 4.96},
    }
    with StartDisplay(options) as display:
        display.show(NodeReady(9.0, facts))
    shown = capfd.readouterr().err
    assert "g0.worker0: the weights 2.0 s, CUDA graphs 3.0 s\n" in shown


@pytest.mark.node
def test_node_json_says_what_a_group_that_came_back_has_found(
    start_node: Callable[..., str], tiny_model_dir: Path
) -> None:
    """Written anew when it is ready again; a file that cannot be written ends no group."""
    name = start_node(
        name="anew", model=str(tiny_model_dir), load_format="dummy", device="sim", groups=(1, 1)
    )
    first = read_facts(name)
    assert first is not None
    (node_dir(name) / "node.json").write_text(json.dumps(first | {"of the first": True}))
    scratch = node_dir(name) / ".node.json"
    scratch.mkdir()
    for victim in ("g0.worker0", "g1.scheduler"):
        os.kill(pid := pids(name)[victim], signal.SIGKILL)
        wait_for("the node is whole again", lambda pid=pid: not alive(pid) and whole(name), 10)
        if victim == "g0.worker0":
            assert "of the first" in (read_facts(name) or {})
            scratch.rmdir()
    anew = read_facts(name)
    assert anew is not None
    assert anew.keys() == first.keys() and anew["details"].keys() == first["details"].keys()
    assert [anew[key] for key in ("pid", "state", "kv_tokens")] == [
        first[key] for key in ("pid", "state", "kv_tokens")
    ]
