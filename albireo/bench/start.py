"""`albireo bench start`: how long a node takes until clients can be served, phase by phase.

With --weights checkpoint the shape's random weights are written as a Hugging Face
directory first, which the node then loads as it would any; they are in the page cache,
as those of a node that starts again.  With dummy there is nothing to read.  The first
round also compiles kernels, where the cache of kernels does not have them.

The supervisor's phases follow each other; a worker's are its own, and within the last of those.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from albireo.node.events import Event, NodeReady, PhaseBegun
from albireo.node.options import NodeOptions

from .machine import machine
from .nodes import BenchError, running_node, workers_phases
from .shapes import write_model


def bench_start(
    shape: str, options: NodeOptions, weights: str, directory: Path | None, rounds: int
) -> dict[str, Any]:
    """directory: where the checkpoint is written, and removed from; None: with temporary files.

    Raises BenchError when the node does not start, or there is no room for the checkpoint.
    """
    with tempfile.TemporaryDirectory(prefix="albireo-start-", dir=directory) as path:
        write_model(shape, Path(path))
        nbytes = _write_checkpoint(Path(path)) if weights == "checkpoint" else 0
        options = msgspec.structs.replace(
            options, model=path, served_model_name=shape,
            load_format="auto" if weights == "checkpoint" else "dummy",
        )  # fmt: skip
        found = [_measure(options) for _ in range(rounds)]
    return {
        "bench": "start",
        "machine": machine(),
        "shape": shape,
        "groups": list(options.groups),
        "weights": weights,
        "checkpoint_gb": round(nbytes / 1e9, 2),
        "device": found[0]["device"],
        "dtype": found[0]["dtype"],
        "kv_tokens": found[0]["kv_tokens"],
        "rounds": [
            {name: each[name] for name in ("ready_s", "phases_s", "workers_phases_s")}
            for each in found
        ],
    }


def _write_checkpoint(directory: Path) -> int:
    from safetensors import SafetensorError

    from .checkpoint import write_checkpoint

    try:
        return write_checkpoint(directory)
    except (OSError, SafetensorError) as error:
        raise BenchError(
            f"the checkpoint could not be written to {directory}: {error}; name a directory with "
            "more room with --dir, or leave it out with --weights dummy"
        ) from error


def _measure(options: NodeOptions) -> dict[str, Any]:
    """One start."""
    phases = _Phases()
    with running_node(options, phases.heard):
        ready_s, by_name = phases.ended()
    facts = phases.facts
    return facts | {
        "ready_s": ready_s,
        "phases_s": by_name,
        "workers_phases_s": workers_phases(facts),
    }


class _Phases:
    """Seconds of the supervisor's phases, from this object's making on.

    facts: what the node says of itself when it is ready.
    """

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self._began = time.monotonic()
        self._marks = [("starting the supervisor", self._began)]

    def heard(self, event: Event) -> None:
        if isinstance(event, PhaseBegun):
            # What follows a colon is how far it is.
            self._marks.append((event.text.partition(":")[0], time.monotonic()))
        elif isinstance(event, NodeReady):
            self.facts = event.facts

    def ended(self) -> tuple[float, dict[str, float]]:
        """Seconds in all, and those of each phase."""
        now = time.monotonic()
        ends = [at for _, at in self._marks[1:]] + [now]
        taken: dict[str, float] = {}
        for (name, began), end in zip(self._marks, ends, strict=True):
            taken[name] = taken.get(name, 0.0) + end - began
        return round(now - self._began, 2), {name: round(each, 2) for name, each in taken.items()}
