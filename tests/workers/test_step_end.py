"""The wait for a step's end in machine code, with functions of this test in CUDA's place."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from albireo.workers.engine.cuda.event_waiter import EventTimes, EventWaiter
from albireo.workers.kernels.cpu.step_end import EventCalls, fill_rows

BROKEN = 719


class Event:
    """Known to CUDA by its handle, which here says when it happens."""

    def __init__(self, cuda_event: int) -> None:
        self.cuda_event = cuda_event

    def synchronize(self) -> None:
        if self.cuda_event == BROKEN:
            raise RuntimeError("unspecified launch failure")


def calls(
    asked: list[tuple[int, ...]],
    status: int = 0,
    broken_pair: tuple[int, int] = (0, 0),
    synchronize: Any = None,
) -> EventCalls:
    """Functions that note what they are asked; events are as far apart as their handles."""

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64)
    def noted(event: int) -> int:
        asked.append((event,))
        return event if event == BROKEN else status

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_float), ctypes.c_int64, ctypes.c_int64)
    def elapsed(found: Any, begin: int, end: int) -> int:
        asked.append((begin, end))
        found[0] = (end - begin) / 4
        return 600 if (begin, end) == broken_pair else 0

    return EventCalls(synchronize or noted, elapsed)


def waiting(before: int | None, *events: int) -> Callable[[EventWaiter], EventTimes]:
    """What waits for events of these handles."""
    first: Any = None if before is None else Event(before)
    rest: list[Any] = [Event(each) for each in events]
    return lambda waiter: waiter.wait(first, *rest)


def test_it_waits_and_then_asks_for_the_times() -> None:
    asked: list[tuple[int, ...]] = []
    waiter = EventWaiter(calls(asked))
    first, second = (
        [Event(each) for each in (100, 103, 104, 105)],
        [Event(each) for each in (106, 110, 111, 113)],
    )
    assert waiter.wait(None, *first) == EventTimes(None, 0.75, 0.25)  # type: ignore[arg-type]
    assert asked == [(105,), (100, 103), (103, 104)]
    asked.clear()
    times = waiter.wait(first[2], *second)  # type: ignore[arg-type]
    assert times == EventTimes(0.5, 1.0, 0.25)
    assert (times.forward_us, times.step_us) == (1000, 1250)
    assert asked == [(113,), (104, 106), (106, 110), (110, 111)]


def test_a_broken_gpu_is_an_error_with_its_own_words() -> None:
    asked: list[tuple[int, ...]] = []
    with pytest.raises(RuntimeError, match="launch failure"):
        waiting(None, 1, 2, 3, BROKEN)(EventWaiter(calls(asked)))
    assert asked == [(BROKEN,)], "no time is asked for"
    with pytest.raises(RuntimeError, match="CUDA error 7 "):
        waiting(None, 1, 2, 3, 4)(EventWaiter(calls([], status=7)))


@pytest.mark.parametrize("pair", [(4, 5), (5, 7), (7, 8)])
def test_a_time_that_cannot_be_had_is_an_error(pair: tuple[int, int]) -> None:
    with pytest.raises(RuntimeError, match="CUDA error 600 "):
        waiting(4, 5, 7, 8, 9)(EventWaiter(calls([], broken_pair=pair)))


def test_another_thread_works_while_it_waits() -> None:
    """A function of the C library, which knows nothing of the interpreter's lock, waits for it."""
    rounds, ended = 0, threading.Event()

    def work() -> None:
        nonlocal rounds
        while not ended.wait(0.001):
            rounds += 1

    thread = threading.Thread(target=work)
    thread.start()
    waiter = EventWaiter(calls([], synchronize=ctypes.CDLL(None).usleep))
    before = rounds
    waiting(None, 1, 2, 3, 300_000)(waiter)
    during = rounds - before
    ended.set()
    thread.join()
    assert during > 20


def test_rows_say_what_was_sampled_or_why_nothing_was() -> None:
    ids = np.array([5, 0, ~3, 2**31 - 1, ~0, 77], np.int32)
    rows = np.arange(18, dtype=np.int32).reshape(6, 3)
    fill_rows(ids, rows, 5)
    assert rows.tolist() == [
        [0, 1, 5], [3, 1, 0], [6, 0, 3], [9, 1, 2**31 - 1], [12, 0, 0], [15, 16, 17],
    ]  # fmt: skip
