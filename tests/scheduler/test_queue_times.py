"""Waiting ends with a request's first slot, and counts once."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from albireo.ipc.messages import Submit
from albireo.ipc.plan import TAKE_REQUEST, TAKE_WORDS, Int32Array
from albireo.scheduler.queue_times import QueueTimes

FIRST = Submit(
    request=1, prompt_ids=[1], max_tokens=1, min_tokens=0, temperature=0.0, top_k=0, top_p=1.0,
    min_p=0.0, seed=0, stop=(), stop_token_ids=(), include_stop=False, skip_special_tokens=True,
    arrived_s=10.0,
)  # fmt: skip


def take(*requests: int) -> Int32Array:
    found = np.zeros((len(requests), TAKE_WORDS), np.int32)
    found[:, TAKE_REQUEST] = requests
    return found


def test_from_arrival_to_the_first_slot() -> None:
    times = QueueTimes()
    times.submitted(FIRST)
    times.submitted(msgspec.structs.replace(FIRST, request=2, arrived_s=10.5))
    times.planned(take(2), 10.53)
    times.planned(take(1, 7), 12.0)
    assert times.histogram.total == pytest.approx(0.03 + 2.0)
    assert sum(times.histogram.counts) == 2
    times.planned(take(1, 2), 20.0)
    assert sum(times.histogram.counts) == 2, "preempted, and back"


def test_who_did_not_wait_for_a_first_slot_does_not_count() -> None:
    times = QueueTimes()
    times.submitted(msgspec.structs.replace(FIRST, resumed=1))
    times.submitted(msgspec.structs.replace(FIRST, request=2, arrived_s=0.0))
    times.submitted(msgspec.structs.replace(FIRST, request=3))
    times.gone(3)
    times.gone(99)
    times.submitted(msgspec.structs.replace(FIRST, request=4))
    times.clear()
    times.planned(take(1, 2, 3, 4), 12.0)
    assert sum(times.histogram.counts) == 0
