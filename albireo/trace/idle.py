"""Where a device did nothing between two steps."""

from __future__ import annotations

from albireo.ipc.stages import Stage
from albireo.ipc.timeline import Records


def idle_spans(records: Records) -> list[tuple[int, int, int]]:
    """(start_ns, end_ns, the step that came then) for each gap of a device's records."""
    records = records[(records["stage"] == Stage.FORWARD) | (records["stage"] == Stage.SAMPLE)]
    gaps = records["start_ns"][1:] > records["end_ns"][:-1]
    return list(
        zip(
            records["end_ns"][:-1][gaps].tolist(),
            records["start_ns"][1:][gaps].tolist(),
            records["step"][1:][gaps].tolist(),
            strict=True,
        )
    )
