"""The status tree has the shape that docs/protocol.md promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from albireo.ipc.messages import GroupStats, SchedulerStats

from ..trace.synthetic import write_group
from .conftest import Neighbourhood

DOC = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()


def test_the_status_tree_is_the_one_in_the_doc(
    neighbourhood: Neighbourhood, runtime_dir: Path
) -> None:
    write_group(runtime_dir, 5)
    neighbourhood.start()
    neighbourhood.supervisor().topology("ready")
    group = neighbourhood.group()
    client = neighbourhood.client()
    group.send(GroupStats(0, SchedulerStats(0, 0, 0, 64, 0, 0, 0, 0, 0, 0.0, 0.0)))
    while True:
        client.send(type="status", id=1)
        status = client.receive()["status"]
        if status["actors"] and status["groups"][0]["scheduler"]:
            break
    assert outline(status) == [
        (len(line) - len(line.lstrip()), line.split()[0])
        for line in DOC.split("## The status tree")[1].split("```")[1].splitlines()
        if line.strip()
    ]


def outline(tree: dict[str, Any], depth: int = 0) -> list[tuple[int, str]]:
    """Indentation and name of every key, in order; of a list, those of its first element."""
    found = []
    for name, value in tree.items():
        found.append((depth, name))
        inner = value[0] if isinstance(value, list) and value else value
        if isinstance(inner, dict):
            found += outline(inner, depth + 2)
    return found
