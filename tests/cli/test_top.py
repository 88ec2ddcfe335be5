"""`albireo top`: what it draws, its keys on a terminal, and its output for programs."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from albireo.cli.keyboard import _keys
from albireo.cli.top_cells import bar
from albireo.cli.top_screen import Screen, dashboard, help_page, key_line
from albireo.client import Client
from albireo.live.history import History
from albireo.live.machine import GpuReading
from albireo.live.picture import Picture, picture
from albireo.node.launch import stop_node

from ..live.trees import group, sample

ALBIREO = str(Path(sys.executable).with_name("albireo"))
WAIT_S = 20.0


def seen(device: str = "cpu", **fields: Any) -> Picture:
    history = History()
    gpus = {"a": GpuReading(uuid="a", name="NVIDIA H100", utilization=0.9, power_w=600.0)}
    history.add(sample(1.0, group(), group(1), cpu_s={"router": 1.0}, gpus=gpus))
    history.add(sample(3.0, group(tokens=600, **fields), group(1, state="restarting",
                       scheduler=None, stages=None), cpu_s={"router": 1.4}, gpus=gpus))  # fmt: skip
    return picture(history)


def drawn(renderable: Any, width: int = 120, height: int = 50) -> list[str]:
    console = Console(width=width, height=height, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_everything_is_on_it(width: int) -> None:
    lines = drawn(dashboard(seen(), [1.0, 300.0]), width)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    for each in (
        "tokens/s", "300", "running", "TTFT", "ITL", "ready", "restarting", "serial 10.0%", "T1",
        "T2 input", "T3 forward", "T4 sample", "T5 output", "idle", "router", "20%", "g0.worker0",
    ):  # fmt: skip
        assert each in text, each
    assert "the cpu device has no GPU" in text and "0 W" not in text


def test_the_bars_are_on_the_scale_of_a_step() -> None:
    lines = {line.split()[1]: line for line in drawn(dashboard(seen())) if " T" in line[:4]}
    assert lines["forward"].count("━") + lines["forward"].count("╸") == 24  # 0.9 of 26, rounded up
    assert lines["sample"].count("━") == 2
    assert "900 µs" in lines["forward"] and "80.0 µs" in lines["sample"]
    assert bar(10, [(0.001, "red"), (0.0, "blue")]).plain == "╸─────────"
    assert bar(10, [(0.0, "red"), (0.0, "blue")]).plain == "──────────"
    assert bar(10, [(0.9, "red"), (0.3, "blue")]).plain == "━━━━━━━━━━"


def test_gpus_are_shown_where_they_are() -> None:
    text = "\n".join(drawn(dashboard(seen(gpus=["a"]))))
    assert "H100" in text and "600 W" in text and "90%" in text and "no GPU" not in text
    assert "2.000" in text, "600 W for 2 s make 600 tokens"


def test_scrolling_stays_within_the_picture() -> None:
    screen = Screen()
    screen.body, screen.keys = dashboard(seen()), key_line(1.0, False, True)
    console = Console(width=100, height=12, file=io.StringIO())

    def shown() -> list[str]:
        rows = console.render_lines(screen, console.options.update(height=12))
        return ["".join(segment.text for segment in row) for row in rows]

    top = shown()
    assert "albireo" in top[0] and "quit" in top[-1] and len(top) == 12
    screen.scroll = 10_000
    assert "g0.worker0" in "".join(shown()) and 0 < screen.scroll < 100
    screen.scroll = -5
    assert shown() == top and screen.scroll == 0


def test_help_names_the_keys() -> None:
    text = "\n".join(drawn(help_page()))
    assert "quit" in text and "pause" in text and "scroll" in text


def test_keys_of_a_terminal() -> None:
    assert list(_keys(b"q")) == ["q"]
    assert list(_keys(b" +\x1b[A\x1b[6~p")) == ["space", "+", "up", "page down", "p"]
    assert list(_keys(b"\x1b")) == ["escape"]
    assert list(_keys(b"\x1b[15~q")) == [], "a key without a name takes what follows it along"


class Terminal:
    """`albireo top` on a terminal of 120 x 50, and what it has written there."""

    def __init__(self, *words: str) -> None:
        self.text = ""
        self._far, near = pty.openpty()
        os.set_blocking(self._far, False)
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "50"}
        self.process = subprocess.Popen(
            [ALBIREO, "top", *words], stdin=near, stdout=near, stderr=near, env=environment
        )
        os.close(near)

    def press(self, keys: str) -> None:
        self.text = ""
        os.write(self._far, keys.encode())

    def until(self, text: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while text not in self.text:
            assert time.monotonic() < deadline, (text, self.text[-3000:])
            if select.select([self._far], [], [], 0.1)[0]:
                self.text += os.read(self._far, 1 << 16).decode(errors="replace")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._far)


@pytest.fixture
def terminal(node_home: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*words: str) -> Terminal:
        opened.append(Terminal(*words))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


@pytest.mark.node
def test_keys_programs_and_a_node_that_goes_and_comes(
    start_node: Callable[..., str], tiny_model_dir: Path, terminal: Callable[..., Terminal]
) -> None:
    def start() -> None:
        start_node(name="topped", device="sim", sim_step_ms=1.0, model=str(tiny_model_dir))

    screen = terminal("--name", "topped", "-d", "0.25")
    screen.until("waiting for it")
    start()
    screen.until("g0.worker0")
    screen.press("h")
    screen.until("keys of albireo top")
    screen.press("\x1b")
    screen.until("g0.worker0")
    screen.press("p")
    screen.until("paused")
    screen.press("-p")
    screen.until("every 0.5 s")
    check_output_for_programs()
    stop_node("topped", now=True, timeout_s=20)
    screen.until("waiting for it")
    start()
    screen.press("")
    screen.until("g0.worker0")
    screen.press("q")
    assert screen.process.wait(WAIT_S) == 0


def check_output_for_programs() -> None:
    with Client.connect(node="topped") as client:
        client.generate([1, 2, 3], max_tokens=50, ignore_eos=True)
    command = [ALBIREO, "top", "--name", "topped"]
    with subprocess.Popen([*command, "--json", "-d", "0.1"], stdout=subprocess.PIPE) as lines:
        assert lines.stdout is not None
        trees = [json.loads(lines.stdout.readline()) for _ in range(3)]
        lines.terminate()
    assert [each["span_s"] for each in trees] == sorted(each["span_s"] for each in trees)
    assert trees[0]["groups"][0]["state"] == "ready" and trees[0]["energy"] is None
    assert trees[0]["rates"]["tokens_per_s"] == 0.0
    plain = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "g0.worker0" in plain.stdout and "\x1b" not in plain.stdout


def test_no_node(node_home: Path) -> None:
    done = subprocess.run([ALBIREO, "top", "--once"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "no node named 'default' is running" in done.stderr
