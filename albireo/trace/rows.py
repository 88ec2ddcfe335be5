"""The timelines of a node as rows: one for each actor, and one for each device.

NodeTimelines is kept by whoever reads more than once (the router, for status):
it opens a timeline when its actor appears and lets go of it when it is gone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from albireo.ipc.timeline import (
    ACTOR,
    CAPACITY,
    DEVICE,
    DIRECTORY,
    RESULTS,
    Records,
    TimelineError,
    TimelineReader,
)

_NAME = re.compile(r"(?:g(\d+)\.)?([a-z]+?)(\d*)\.(\d+)")


@dataclass(frozen=True)
class Source:
    """Where a row's records come from.

    name: as shown, e.g. "g0.scheduler" or "g0.device1".  group, rank: -1 where
    they mean nothing.  ended: a later incarnation of the actor has begun.
    """

    name: str
    role: str
    group: int
    rank: int
    incarnation: int
    ended: bool
    track: int
    reader: TimelineReader

    @property
    def device(self) -> bool:
        """Whether it is what the worker's device did, not the worker."""
        return self.track == DEVICE

    @property
    def written(self) -> int:
        """Records so far."""
        return self.reader.written(self.track)

    def newest(self, count: int = CAPACITY) -> Records:
        return self.reader.newest(self.track, count)


class NodeTimelines:
    """Of the node whose runtime directory is given."""

    def __init__(self, runtime_dir: Path) -> None:
        self._directory = runtime_dir / DIRECTORY
        self._readers: dict[str, TimelineReader] = {}

    def sources(self) -> list[Source]:
        """All rows that there are now: the node's own first, then group by group."""
        try:
            names = sorted(path.name for path in self._directory.iterdir())
        except OSError:
            names = []
        for gone in self._readers.keys() - set(names):
            del self._readers[gone]
        latest: dict[str, int] = {}
        for name in names:
            actor, _, incarnation = name.rpartition(".")
            latest[actor] = max(latest.get(actor, 0), int(incarnation))
        found: list[Source] = []
        for name in names:
            match, reader = _NAME.fullmatch(name), self._reader(name)
            if match is not None and reader is not None:
                found += _sources_of(match, reader, latest[name.rpartition(".")[0]])
        found.sort(key=_place)
        return found

    def group(self, number: int) -> list[Source]:
        """The rows of a group's present actors."""
        return [each for each in self.sources() if each.group == number and not each.ended]

    def _reader(self, name: str) -> TimelineReader | None:
        if name not in self._readers:
            try:
                self._readers[name] = TimelineReader(self._directory / name)
            except (OSError, TimelineError):
                return None
        return self._readers[name]


def _sources_of(match: re.Match[str], reader: TimelineReader, latest: int) -> list[Source]:
    group, role, rank, incarnation = match.groups()
    numbers = (int(group or -1), int(rank or -1), int(incarnation), int(incarnation) < latest)
    prefix = f"g{group}." if group else ""
    names = {ACTOR: role, DEVICE: "device", RESULTS: "results"}
    return [
        Source(f"{prefix}{names[track]}{rank}", role, *numbers, track, reader)
        for track in range(min(reader.tracks, len(names)))
    ]


_ORDER = ("router", "tokenizer", "gateway", "scheduler", "worker", "detokenizer")


def _place(source: Source) -> tuple[int, int, int, int, int]:
    """Groups in order; in a group as a step goes: scheduler, workers and devices, detokenizer."""
    role = _ORDER.index(source.role) if source.role in _ORDER else len(_ORDER)
    return source.group, role, source.rank, source.incarnation, source.track
