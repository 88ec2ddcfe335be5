"""A stretch as one HTML page that needs nothing else: no server, no network, no other file.

page.html is the skeleton; page.css and page.js are put into it with the data.
"""

from __future__ import annotations

import json
from datetime import datetime
from importlib.resources import files
from typing import Any

import msgspec

from albireo.ipc.stages import Stage, Task
from albireo.ipc.timeline import NO_STEP

from .capture import Row, Stretch
from .chrome import known
from .idle import idle_spans


def html_page(stretch: Stretch) -> str:
    """The page's text."""
    data = {
        "node": stretch.node,
        "made": datetime.now().astimezone().isoformat(" ", "seconds"),
        "steps": stretch.steps,
        "length": stretch.end_ns - stretch.begin_ns,
        "tasks": {int(task): task.label for task in Task},
        "stages": {int(stage): [stage.name.lower(), int(stage.task)] for stage in Stage},
        "rows": [_row(row, stretch.begin_ns) for row in stretch.rows],
        "stats": {group: msgspec.to_builtins(stats) for group, stats in stretch.stats.items()},
    }
    # Whatever a name may hold, it cannot end the script element.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = _part("page.html").replace("/*STYLE*/", _part("page.css"))
    return page.replace("/*DATA*/", text).replace("/*SCRIPT*/", _part("page.js"))


def _row(row: Row, begin_ns: int) -> dict[str, Any]:
    """Spans as flat lists: start, length (ns), stage, step (-1: none), count; idle: start, length,
    step."""
    spans: list[int] = []
    for start_ns, end_ns, step, detail, _, stage in known(row.records):
        number = -1 if step == NO_STEP else step
        spans += (start_ns - begin_ns, end_ns - start_ns, stage, number, detail)
    idle: list[int] = []
    if row.device:
        for start_ns, end_ns, step in idle_spans(row.records):
            idle += (start_ns - begin_ns, end_ns - start_ns, step)
    return {
        "name": row.name,
        "role": row.role,
        "group": row.group,
        "device": row.device,
        "ended": row.ended,
        "spans": spans,
        "idle": idle,
    }


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")
