"""What the node itself says of a request's phase: the steps in its actors' timelines.

A request that is asked of an idle group runs from the group's next step on: a prompt of C chunks
and M tokens is whole with the C-th step from then on, and its last token is computed in step
C + M - 1.  Steps are counted by the worker when their result is delivered, and by the detokenizer
when their text is made.  They only grow: what is true before a fault and still true behind it was
true when it struck.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from albireo.ipc.stages import Stage
from albireo.trace.rows import NodeTimelines, Source

from .load import TOKENS, Life

MAX_NUM_SEQS = 2
"""That run at a time in a group: who comes behind them is queued."""
CHUNK = 16
"""Tokens of a prompt that a step computes at most."""

_NEWEST = 8


@dataclass(frozen=True)
class Seat:
    """A request's place: its group, the group's last step before the first request of now, and how
    many requests the group had before this one."""

    life: Life
    group: int
    step: int
    rank: int

    @property
    def prompt_step(self) -> int:
        """In which the whole prompt is computed; of one that runs at once."""
        chunks: int = -(-len(self.life.story.prompt) // CHUNK)
        return self.step + chunks

    @property
    def last_step(self) -> int:
        """In which the last token is computed; of one that runs at once."""
        return self.prompt_step + int(self.life.story.params["max_tokens"]) - 1

    @property
    def runs(self) -> bool:
        """Whether it does not wait for another one's end."""
        return self.rank < MAX_NUM_SEQS


class Sight:
    """Of one node; look() anew when groups have been restarted."""

    def __init__(self, runtime_dir: Path) -> None:
        self._timelines = NodeTimelines(runtime_dir)
        self._sources: dict[str, Source] = {}

    def look(self) -> None:
        """Finds the timelines of the present actors."""
        self._sources = {each.name: each for each in self._timelines.sources() if not each.ended}

    def planned(self, group: int) -> int:
        """The last step that the scheduler has planned; 0 before the first."""
        return self._last(f"g{group}.scheduler", Stage.PLAN)

    def computed(self, group: int) -> int:
        """The last step whose result the worker has delivered."""
        return self._last(f"g{group}.worker0", Stage.DELIVER)

    def told(self, group: int) -> int:
        """The last step of which the detokenizer has made text."""
        return self._last(f"g{group}.detokenizer", Stage.DETOKENIZE)

    def slowest_step_s(self) -> float:
        """Of all that the present workers remember."""
        slowest = 0
        for source in self._sources.values():
            if source.device:
                records = source.newest()
                records = records[records["stage"] == Stage.FORWARD]
                taken = records["end_ns"] - records["start_ns"]
                slowest = max(slowest, int(taken.max(initial=0)))
        return slowest / 1e9

    def in_phase(self, seat: Seat, phase: str) -> bool:
        """Whether it is certain that the request is in that phase, from what can be seen now."""
        life, computed = seat.life, self.computed(seat.group)
        if life.ends or life.over is not None:
            return False
        if phase == "queued":
            # None of those before it has its last token, which takes so many steps at least.
            return not seat.runs and computed < seat.step + TOKENS
        if not seat.runs:
            return False
        if phase == "prefill":
            return seat.step < computed < seat.prompt_step
        if phase == "stream":
            return bool(life.times) and computed < seat.last_step
        return computed >= seat.last_step

    def _last(self, name: str, stage: Stage) -> int:
        source = self._sources.get(name)
        if source is None:
            return 0
        records = source.newest(_NEWEST)
        steps = records["step"][records["stage"] == stage]
        return int(steps.max(initial=0))
