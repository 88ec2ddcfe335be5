"""The node of an LLM ends with it, whichever way that ends, and leaves nothing behind."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from albireo import LLM
from albireo.client import NodeNotRunning
from albireo.node.runtime_dir import read_facts

from ..node.processes import alive, pids, shared_memory_files, wait_for

pytestmark = pytest.mark.node

_START = "from albireo import LLM\nllm = LLM({model!r}, device='sim', sim_step_ms=5.0)\n"
_SAY = "print(*(a['pid'] for a in llm.client.status()['actors']), flush=True)\n"


def script(model: Path, then: str) -> list[str]:
    return [sys.executable, "-c", _START.format(model=str(model)) + _SAY + then]


def nothing_left(home: Path) -> bool:
    return not any(
        path.exists() and list(path.iterdir()) for path in (home / "run", home / "state")
    )


def test_close(module_home: Path, tiny_model_dir: Path) -> None:
    in_shm = shared_memory_files()
    llm = LLM(tiny_model_dir, device="sim", sim_step_ms=5.0)
    ids = pids(llm.name)
    errors: list[Exception] = []

    def generate() -> None:
        try:
            llm.generate([[1, 2]] * 300)
        except NodeNotRunning as error:
            errors.append(error)

    waiting = threading.Thread(target=generate)
    waiting.start()
    wait_for("it answers", lambda: llm.client.status()["requests"]["in_flight"] > 0, 5)
    llm.close()
    waiting.join(5)
    assert len(errors) == 1
    assert not [name for name, pid in ids.items() if alive(pid)]
    assert nothing_left(module_home) and shared_memory_files() <= in_shm
    llm.close()
    with pytest.raises(NodeNotRunning, match="this LLM is closed"):
        llm.generate("a")


def test_the_last_reference(module_home: Path, tiny_model_dir: Path) -> None:
    llm = LLM(tiny_model_dir, device="sim")
    ids = pids(llm.name)
    del llm
    assert not [name for name, pid in ids.items() if alive(pid)]
    assert nothing_left(module_home)


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)\n", "1 / 0\n"])
def test_the_end_of_the_program(module_home: Path, tiny_model_dir: Path, end: str) -> None:
    run = "llm.generate([[1, 2]] * 5, max_tokens=2)\n"
    ended = subprocess.run(
        script(tiny_model_dir, run + end), capture_output=True, text=True, timeout=30
    )
    assert ("ZeroDivisionError" in ended.stderr) == ("/" in end), ended.stderr
    assert len(ended.stdout.split()) >= 9
    assert not [pid for pid in ended.stdout.split() if alive(int(pid))]
    assert nothing_left(module_home)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_program_is_killed(
    module_home: Path, tiny_model_dir: Path, how: signal.Signals
) -> None:
    run = "llm.generate([[1, 2]] * 500, max_tokens=400, ignore_eos=True)\n"
    with subprocess.Popen(
        script(tiny_model_dir, run), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as program:
        assert program.stdout is not None
        ids = [int(pid) for pid in program.stdout.readline().split()]
        assert len(ids) >= 9
        program.send_signal(how)
    wait_for("every process is gone", lambda: not any(map(alive, ids)), 5)
    wait_for("nothing is left", lambda: nothing_left(module_home), 5)


def test_the_program_is_killed_while_the_node_starts(
    module_home: Path, tiny_model_dir: Path
) -> None:
    with subprocess.Popen(script(tiny_model_dir, ""), stdout=subprocess.DEVNULL) as program:
        wait_for("it starts", lambda: bool(supervisors(module_home)), 20)
        program.kill()
        ids = supervisors(module_home)
    wait_for("the supervisor is gone", lambda: not any(map(alive, ids)), 10)
    wait_for("nothing is left", lambda: nothing_left(module_home), 5)


def supervisors(home: Path) -> list[int]:
    names = [path.name for path in (home / "run").glob("llm-*")] if home.exists() else []
    return [int(facts["pid"]) for facts in map(read_facts, names) if facts is not None]


def test_the_bar(module_home: Path, tiny_model_dir: Path) -> None:
    """On a terminal, and nowhere else."""
    run = "llm.generate([[1, 2]] * 21, max_tokens=2, ignore_eos=True)\nllm.close()\n"
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        script(tiny_model_dir, run), stdout=subprocess.DEVNULL, stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    ) as program:  # fmt: skip
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 65536):
                shown += chunk
        except OSError:
            pass
        assert program.wait(30) == 0
    os.close(ours)
    text = shown.decode()
    assert "21/21" in text and "tokens/s" in text and "starting" in text
    ended = subprocess.run(script(tiny_model_dir, run), capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stderr) == (0, "")
