"""A stretch in the trace-event format that chrome://tracing and ui.perfetto.dev read."""

from __future__ import annotations

from typing import Any

import numpy as np

from albireo.ipc.stages import Stage
from albireo.ipc.timeline import NO_STEP, Records

from .capture import Row, Stretch
from .idle import idle_spans


def chrome_trace(stretch: Stretch) -> dict[str, Any]:
    """The whole file: a process for each group and one for the node, a thread for each row.

    Times are microseconds from the stretch's begin.
    """
    events: list[dict[str, Any]] = []
    for group in sorted({row.group for row in stretch.rows}):
        name = f"node {stretch.node}" if group < 0 else f"group {group}"
        events.append(_meta("process_name", group + 1, 0, name=name))
        events.append(_meta("process_sort_index", group + 1, 0, sort_index=group + 1))
    for thread, row in enumerate(stretch.rows, 1):
        name = f"{row.name} (ended)" if row.ended else row.name
        events.append(_meta("thread_name", row.group + 1, thread, name=name))
        events.append(_meta("thread_sort_index", row.group + 1, thread, sort_index=thread))
        events += _events(row, thread, stretch.begin_ns)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"node": stretch.node, "steps": stretch.steps},
    }


def _events(row: Row, thread: int, begin_ns: int) -> list[dict[str, Any]]:
    events = [
        _span(row, thread, begin_ns, record, Stage(record[5])) for record in known(row.records)
    ]
    if row.device:
        for start_ns, end_ns, step in idle_spans(row.records):
            events.append(
                {
                    "ph": "X", "name": "idle", "cat": "idle", "pid": row.group + 1, "tid": thread,
                    "ts": (start_ns - begin_ns) / 1000, "dur": (end_ns - start_ns) / 1000,
                    "args": {"before_step": step},
                }
            )  # fmt: skip
    return events


def known(records: Records) -> list[tuple[int, ...]]:
    """Records of stages that this version knows, as tuples in the order of RECORD's fields."""
    fields = ["start_ns", "end_ns", "step", "detail", "sequence", "stage"]
    found: list[tuple[int, ...]] = records[np.isin(records["stage"], list(Stage))][fields].tolist()
    return found


def _span(
    row: Row, thread: int, begin_ns: int, record: tuple[int, ...], stage: Stage
) -> dict[str, Any]:
    start_ns, end_ns, step, detail = record[:4]
    return {
        "ph": "X",
        "name": stage.name.lower(),
        "cat": stage.task.label,
        "pid": row.group + 1,
        "tid": thread,
        "ts": (start_ns - begin_ns) / 1000,
        "dur": (end_ns - start_ns) / 1000,
        "args": ({} if step == NO_STEP else {"step": step}) | {"count": detail},
    }


def _meta(name: str, process: int, thread: int, /, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": process, "tid": thread, "args": args}
