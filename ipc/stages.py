"""What actors do that is worth a record: the stages, and the task of a step each belongs to.

Numbers are part of the timeline's format (timeline.py): never change one, never
use one again.  A step's tasks are those of the design: T1 schedule -> T2 input
-> T3 forward -> T4 sample -> T5 output.
"""

from __future__ import annotations

from enum import IntEnum


class Task(IntEnum):
    """OTHER: work that belongs to no step.  PAUSE: no work at all."""

    OTHER = 0
    SCHEDULE = 1
    INPUT = 2
    FORWARD = 3
    SAMPLE = 4
    OUTPUT = 5
    PAUSE = 6

    @property
    def label(self) -> str:
        number = f"T{self.value} " if Task.SCHEDULE <= self <= Task.OUTPUT else ""
        return number + self.name.lower()


class Stage(IntEnum):
    """A record's stage; the comment says what its `detail` counts."""

    PLAN = 1  # rows of the step
    APPLY = 2  # result rows
    REQUESTS = 3  # messages taken by the scheduler
    INPUT = 4  # plan words
    FORWARD = 5  # rows
    SAMPLE = 6  # rows
    DELIVER = 7  # result rows
    DETOKENIZE = 8  # result rows
    SEND = 9  # pieces of text
    ROUTE = 10  # pieces of text
    ADMIT = 11  # requests taken by the router
    ENCODE = 12  # requests to the tokenizer
    WAIT = 13  # the worker has no plan
    NO_WORK = 14  # the scheduler has no request

    @property
    def task(self) -> Task:
        return _TASKS[self]


_TASKS = {
    Stage.PLAN: Task.SCHEDULE,
    Stage.APPLY: Task.SCHEDULE,
    Stage.REQUESTS: Task.SCHEDULE,
    Stage.INPUT: Task.INPUT,
    Stage.FORWARD: Task.FORWARD,
    Stage.SAMPLE: Task.SAMPLE,
    Stage.DELIVER: Task.OUTPUT,
    Stage.DETOKENIZE: Task.OUTPUT,
    Stage.SEND: Task.OUTPUT,
    Stage.ROUTE: Task.OTHER,
    Stage.ADMIT: Task.OTHER,
    Stage.ENCODE: Task.OTHER,
    Stage.WAIT: Task.PAUSE,
    Stage.NO_WORK: Task.PAUSE,
}
