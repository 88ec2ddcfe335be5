"""The chaos run's own parts: a check that cannot fail would be none."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from . import __main__ as command
from .checks import Report, Visit, check_lives
from .load import TOKENS, Life, Story
from .plan import (
    ANY_PHASE,
    OF_A_GROUP,
    PHASES,
    Cell,
    all_cells,
    in_order,
    pairwise,
    phase_of,
    together,
)
from .sight import CHUNK, Seat, Sight
from .wire import Wire

STORY = Story([1, 2], {"max_tokens": 4}, "short", (5, 6, 7, 8), "abcd")


def life(**changes: object) -> Life:
    made = Life(STORY, 0, False, began=10.0)
    made.tokens, made.text, made.times = [5, 6, 7, 8], "abcd", [11.0, 11.1, 11.2, 11.3]
    made.ends, made.over = 1, 11.3
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def wrong(*lives: Life, journal: bool = False, struck: tuple[Cell, ...] = ()) -> list[str]:
    report = Report()
    check_lives(Visit(journal, struck=list(struck), cut=3, lives=list(lives)), report)
    return report.wrong


def test_an_undisturbed_answer_is_right() -> None:
    assert wrong(life(), life(http=True, tokens=[])) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": [5, 6, 9, 8]},
        {"text": "abxd"},
        {"tokens": [5, 6, 6, 7, 8]},
        {"tokens": [5, 6, 7], "text": "abc"},
        {"ends": 0},
        {"ends": 2},
        {"wrong": "no end"},
        {"lost": "ConnectionLost", "ends": 0},
        {"http": True, "text": "ab", "tokens": [], "ends": 0},
    ],
)
def test_everything_else_is_wrong(changes: dict[str, object]) -> None:
    assert wrong(life(**changes))


@pytest.mark.parametrize(
    ("role", "fault", "journal", "changes", "right"),
    [
        ("router", "kill", False, {}, True),
        ("router", "kill", True, {}, False),
        ("router", "memory", True, {}, True),
        ("worker", "kill", False, {}, False),
        ("gateway", "kill", True, {"http": True, "tokens": []}, True),
        ("gateway", "kill", False, {}, False),
        ("client", "disconnect", False, {"number": 3}, True),
        ("client", "disconnect", False, {"number": 2}, False),
        ("client", "disconnect", True, {"number": 3}, False),
    ],
)
def test_a_lost_request_is_excused_by_a_fault_on_its_way_alone(
    role: str, fault: str, journal: bool, changes: dict[str, Any], right: bool
) -> None:
    fields = {"lost": "ConnectionLost", "ends": 0, "tokens": [5, 6], "text": "ab", "over": 11.2}
    lost = life(**(fields | changes))
    assert (wrong(lost, journal=journal, struck=(Cell(role, "stream", fault),)) == []) == right


def test_a_selection_has_every_pair() -> None:
    cells = all_cells()
    chosen = pairwise(cells, random.Random(3))
    assert len(chosen) < len(cells) / 2
    for one, other in itertools.combinations(range(3), 2):
        assert {(c[one], c[other]) for c in chosen} == {(c[one], c[other]) for c in cells}
    assert sorted(in_order(cells, random.Random(3))) == sorted(cells)


def test_cells_that_are_visited_together() -> None:
    left, visits = in_order(all_cells(), random.Random(5)), 0
    while left:
        chosen = together(left)
        assert chosen[0] == left[0]
        roles = [cell.role for cell in chosen if cell.role not in OF_A_GROUP]
        assert len(chosen) - len(roles) <= 2 and len(set(roles)) == len(roles)
        assert {cell.phase for cell in chosen} <= {phase_of(chosen), ANY_PHASE}
        if {"router", "supervisor", "forkserver"} & {*roles}:
            assert len(chosen) == 1
        left = [cell for cell in left if cell not in chosen]
        visits += 1
    assert visits < len(all_cells()) * 0.6


class Steps(Sight):
    """As if the worker had computed so many steps."""

    def __init__(self, computed: int) -> None:
        self._computed = computed

    def computed(self, group: int) -> int:
        return self._computed


def test_a_phase_is_sure_between_its_steps_alone() -> None:
    prompt = list(range(3 * CHUNK + 1))  # four chunks
    asked = Life(Story(prompt, {"max_tokens": TOKENS}, "long"), 0, False)
    running, queued = Seat(asked, 0, 100, rank=1), Seat(asked, 0, 100, rank=2)
    assert (running.prompt_step, running.last_step) == (104, 103 + TOKENS)

    def found(seat: Seat) -> dict[str, list[int]]:
        steps = range(99, 120)
        return {p: [n for n in steps if Steps(n).in_phase(seat, p)] for p in PHASES}

    assert found(queued)["queued"] == list(range(99, 100 + TOKENS))
    assert not any(found(queued)[phase] for phase in PHASES[1:])
    assert found(running)["queued"] == found(running)["stream"] == []
    assert found(running)["prefill"] == [101, 102, 103]
    asked.times.append(1.0)
    assert found(running)["stream"] == list(range(99, 103 + TOKENS))
    assert found(running)["ending"] == list(range(103 + TOKENS, 120))
    asked.ends = 1
    assert not any(found(running).values()) and not any(found(queued).values())


@pytest.mark.parametrize(
    ("missing", "options", "wrong", "status"),
    [
        (0, [], [], 0), (1, [], [], 1), (1, ["--pairwise"], [], 1),
        (0, ["--pairwise"], ["lost"], 1), (1, ["--pairwise", "--any-pace"], [], 0),
        (1, ["--pairwise", "--any-pace"], ["lost"], 1),
    ],
)  # fmt: skip
def test_an_empty_cell_fails_the_run(
    missing: int, options: list[str], wrong: list[str], status: int,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    async def run(cells: list[Cell], *_: object) -> Report:
        visit = Visit(True, cells=cells[missing:], struck=cells)
        return Report(visits=[visit], wrong=wrong)

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr(command, "enter", lambda: None)
    monkeypatch.setattr("sys.argv", ["chaos", "--seed", "1", *options, "--model=x"])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == status
    assert f"{len(wrong)} violations, {missing} empty cells, seed 1" in capsys.readouterr().out


def test_a_wire_that_is_cut(tmp_path: Path) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        ended.set()
        writer.close()

    async def story() -> None:
        server = await asyncio.start_unix_server(echo, str(tmp_path / "node"))
        wire = await Wire.open(tmp_path / "wire", tmp_path / "node")
        for _ in range(2):  # it connects again
            reader, writer = await asyncio.open_unix_connection(str(wire.path))
            writer.write(b"ping")
            assert await reader.readexactly(4) == b"ping"
            assert wire.cut() == 1
            assert await reader.read() == b""
            await asyncio.wait_for(ended.wait(), 5)
            ended.clear()
            writer.close()
        assert wire.cut() == 0
        wire.close()
        server.close()

    ended = asyncio.Event()
    asyncio.run(story())


def test_a_small_directory_is_full_of_bytes_and_of_files() -> None:
    program = """
import errno, os
from tests.chaos.full import SHM, Filled, enter, is_small
enter()
if not is_small():
    print("not allowed")
    raise SystemExit
before = os.listdir(SHM)
filled = Filled()
for data in (b"", b"x"):
    try:
        (SHM / "one-more").write_bytes(data)
    except OSError as error:
        assert error.errno == errno.ENOSPC
    else:
        raise AssertionError("there is room")
filled.empty()
(SHM / "one-more").write_bytes(b"x" * 4096)
assert sorted(os.listdir(SHM)) == sorted([*before, "one-more"])
print("full")
"""
    outside = os.listdir("/dev/shm")
    environment = {name: value for name, value in os.environ.items() if "CHAOS" not in name}
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    if found.stdout.strip() == "not allowed":
        pytest.skip("no mount namespace for this user")
    assert (found.stdout.strip(), found.stderr) == ("full", "")
    assert os.listdir("/dev/shm") == outside
