"""The detokenizer process between a router, a scheduler and a worker."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from albireo.ipc.link import Hub, PeerGone, Spoke
from albireo.ipc.messages import (
    Abort,
    Credit,
    GroupStats,
    Joined,
    Output,
    Piece,
    Refused,
    Reset,
    SchedulerStats,
    Submit,
    ToRouter,
    ToScheduler,
)
from albireo.ipc.output_lane import OUTPUT_BYTES
from albireo.ipc.paths import OUTPUT_SOCKET
from albireo.ipc.plan import NOTHING, Int32Array, write_result
from albireo.ipc.protocol import End
from albireo.ipc.ring import RingReader, RingSpec, RingWriter, create_ring
from albireo.ipc.rings import result_ring
from albireo.workers.detokenizer import process as detokenizer
from albireo.workers.detokenizer.detokenizer import Detokenizer

from ..output_receiver import OutputReceiver
from .running_process import (
    DEADLINE_S,
    FakeActor,
    Running,
    actor_spec,
    arrived,
    receive,
)
from .test_logprobs import record
from .test_request import byte_tokens, submission


class Group:
    """A detokenizer with router, scheduler and worker around it."""

    def __init__(self, directory: Path, **engine: Any) -> None:
        self.spec = actor_spec(directory, "detokenizer", **engine)
        ring = result_ring(0, self.spec.engine)
        memory = create_ring(ring)
        event = os.eventfd(0, os.EFD_NONBLOCK)
        self.actor = FakeActor(self.spec)
        self.router: Hub[Any] = Hub(self.spec.socket_path("router"), ToRouter)
        self.outputs = OutputReceiver(f"{directory}/{OUTPUT_SOCKET}")
        self.running = Running(
            detokenizer.main,
            self.actor,
            {"result.memory": memory, "result.event.detokenizer": event},
        )
        self.worker = RingWriter(ring, memory, events=[event])
        self.step = 0
        self.scheduler: Spoke[Any] = Spoke(self.spec.socket_path("g0"), "scheduler", ToScheduler)
        self.read_as_scheduler = _reader_of_scheduler(ring, memory)

    def join(self) -> None:
        self.scheduler.send(Joined("scheduler", 0, 3, 1))
        assert receive(self.router) == [Joined("detokenizer", 0, 3, os.getpid())]
        assert self.actor.is_ready.wait(DEADLINE_S)

    def tell(self, message: Any) -> None:
        """Router to detokenizer."""
        self.router.send(b"g0.3", message)

    def submit(self, request: int, **changes: Any) -> Submit:
        message = submission(request, **changes)
        self.tell(message)
        assert receive(self.scheduler) == [message]
        return message

    def result(self, *rows: tuple[int, int, int], logprobs: Int32Array = NOTHING) -> None:
        """One step's result from the worker."""
        self.step += 1
        frame = self.worker.reserve(DEADLINE_S)
        array = np.array(rows, dtype=np.int32).reshape(-1, 3)
        self.worker.publish(write_result(frame, self.step, array, 1, 1, logprobs))
        self.read_as_scheduler()

    def close(self) -> None:
        self.running.stop()
        self.router.close()
        self.outputs.close()
        self.scheduler.close()


def _reader_of_scheduler(ring: RingSpec, memory: int) -> Callable[[], None]:
    """The ring's other reader, which has to keep up."""
    reader = RingReader(ring, memory, "scheduler")

    def read() -> None:
        reader.wait(DEADLINE_S)
        reader.release()

    return read


def tell_when_connected(group: Group, message: Any) -> None:
    """Tells a detokenizer that has not said anything yet, or is connecting again."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            return group.tell(message)
        except PeerGone:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    made = Group(tmp_path)
    yield made
    made.close()


def test_tokens_become_text_for_the_router(group: Group) -> None:
    group.join()
    group.submit(1)
    group.submit(2, max_tokens=1)
    a, b = byte_tokens("ab")
    group.result((1, 1, a), (2, 1, b))
    assert group.outputs.next() == Output(
        [Piece(1, 0, [a], "a", None), Piece(2, 0, [b], "b", End("length", None, 3, 1))]
    )
    assert group.outputs.joined == Joined("detokenizer", 0, 3, os.getpid())
    group.result((1, 1, 1), (2, 1, b))
    assert group.outputs.next() == Output([Piece(1, 1, [1], "", End("stop", None, 3, 2))])


def test_results_do_not_wait_until_all_requests_of_another_group_are_here(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their text so far is made again, which takes its time."""
    group.join()
    group.submit(1)
    served = threading.Event()
    submit = Detokenizer.submit

    def slow(self: Detokenizer, message: Submit) -> None:
        time.sleep(0.01)
        # The last one may wait for what came meanwhile; if that waits for it, too, nothing comes.
        assert message.request < 21 or served.wait(DEADLINE_S)
        submit(self, message)

    monkeypatch.setattr(Detokenizer, "submit", slow)
    many = [submission(request) for request in range(2, 22)]
    for message in many:
        group.tell(message)
    (a,) = byte_tokens("a")
    group.result((1, 1, a))
    assert group.outputs.next() == Output([Piece(1, 0, [a], "a", None)])
    served.set()
    assert receive(group.scheduler, len(many)) == many


def test_the_group_joins_with_its_scheduler_and_keeps_requests_until_then(group: Group) -> None:
    request = submission(1)
    tell_when_connected(group, request)
    group.tell(submission(2))
    group.tell(Abort(2))
    assert group.router.socket.poll(100) == 0
    assert not group.actor.is_ready.is_set()
    group.join()
    assert receive(group.scheduler, 3) == [request, submission(2), Abort(2)]


def test_stop_strings_and_aborts_reach_the_scheduler(group: Group) -> None:
    group.join()
    group.submit(1, stop=("b",))
    group.submit(2)
    a, b = byte_tokens("ab")
    group.result((1, 1, a))
    assert group.outputs.next() == Output([Piece(1, 0, [a], "a", None)])
    group.result((1, 1, b))
    assert receive(group.scheduler) == [Abort(1)]
    assert group.outputs.next() == Output([Piece(1, 1, [b], "", End("stop", "b", 3, 2))])
    group.tell(Abort(2))
    assert receive(group.scheduler) == [Abort(2)]
    # Surplus rows of both are ignored.
    group.result((1, 1, a), (2, 1, a))
    group.submit(3)
    group.result((3, 1, a))
    assert group.outputs.next() == Output([Piece(3, 0, [a], "a", None)])


def test_refusals_reach_the_router(group: Group) -> None:
    group.join()
    group.submit(1)
    group.submit(2)
    refused = Refused(1, "too_long", "it can never fit")
    group.scheduler.send(refused)
    assert receive(group.router) == [refused]
    group.result((1, 1, 5), (2, 0, 0))
    (failed,) = receive(group.router)
    assert (failed.request, failed.code) == (2, "internal")


def test_statistics_pass_through(group: Group) -> None:
    group.join()
    stats = SchedulerStats(1, 2, 3, 4, 5, 6, 7, 8, 9, 0.5, 0.25)
    group.scheduler.send(stats)
    assert receive(group.router) == [GroupStats(0, stats)]


def test_without_credit_pieces_are_merged_until_there_is_some(group: Group) -> None:
    group.join()
    group.submit(1)
    tokens = byte_tokens("abcdefghijklmnop")
    for token in tokens[: detokenizer.OUTPUT_CREDITS]:
        group.result((1, 1, token))
        assert group.outputs.next().pieces[0].token_ids == [token]
    for token in tokens[detokenizer.OUTPUT_CREDITS :]:
        group.result((1, 1, token))
    assert group.outputs.silent()
    group.tell(Credit(1))
    rest = tokens[detokenizer.OUTPUT_CREDITS :]
    assert group.outputs.next() == Output(
        [Piece(1, len(tokens) - len(rest), rest, "ijklmnop", None)]
    )


@pytest.fixture
def awake(tmp_path: Path) -> Iterator[Group]:
    """Where every process has a core of its own."""
    made = Group(tmp_path, max_num_seqs=300, spin_us=50)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("rows", "parts"),
    [(1, [1]), (64, [64]), (65, [33, 32]), (190, [64, 64, 62]), (299, [75, 75, 75, 74])],
)
def test_many_rows_go_out_in_parts(awake: Group, rows: int, parts: list[int]) -> None:
    awake.join()
    numbers = range(1, rows + 1)
    for number in numbers:
        awake.submit(number)
    (a,) = byte_tokens("a")
    awake.result(*((number, 1, a) for number in numbers))
    outputs = [awake.outputs.next() for _ in parts]
    assert [len(output.pieces) for output in outputs] == parts
    assert [output.more for output in outputs] == [True] * (len(parts) - 1) + [False]
    pieces = [piece for output in outputs for piece in output.pieces]
    assert pieces == [Piece(number, 0, [a], "a", None) for number in numbers]
    assert awake.outputs.silent()


def test_ends_come_last_and_alone(awake: Group) -> None:
    awake.join()
    numbers = range(1, 71)
    for number in numbers:
        awake.submit(number, max_tokens=1 if number in (1, 70) else 9)
    (a,) = byte_tokens("a")
    awake.result(*((number, 1, a) for number in numbers))
    outputs = [awake.outputs.next() for _ in range(3)]
    assert [[piece.request for piece in output.pieces] for output in outputs] == [
        list(range(2, 36)), list(range(36, 70)), [1, 70],
    ]  # fmt: skip
    assert [output.more for output in outputs] == [True, True, False]
    assert [piece.end for piece in outputs[-1].pieces] == [End("length", None, 3, 1)] * 2
    awake.result((2, 1, 1))  # None but an end: it waits for nothing.
    assert awake.outputs.next() == Output([Piece(2, 1, [1], "", End("stop", None, 3, 2))])


def test_a_step_ends_though_nothing_of_its_last_part_is_wanted(awake: Group) -> None:
    awake.join()
    for number in range(1, 36):
        awake.submit(number)
    (a,) = byte_tokens("a")
    awake.result(*((number, 1, a) for number in range(1, 71)))
    first, last = (awake.outputs.next() for _ in range(2))
    assert len(first.pieces) == 35 and first.more
    assert last == Output([], False)
    assert awake.outputs.silent()


def test_parts_leave_a_credit_for_the_ends(awake: Group) -> None:
    awake.join()
    numbers = range(1, 301)
    for number in numbers:
        awake.submit(number, max_tokens=2 if number == 1 else 9)
    (a,) = byte_tokens("a")
    outputs = []
    for _ in range(2):
        awake.result(*((number, 1, a) for number in numbers))
        outputs += [awake.outputs.next() for _ in range(detokenizer.OUTPUT_CREDITS // 2)]
    assert [output.more for output in outputs] == [True, True, True, False] * 2
    awake.result(*((number, 1, a) for number in numbers))
    assert awake.outputs.silent()
    assert outputs[-1].pieces[-1].end == End("length", None, 3, 2)
    awake.tell(Credit(1))
    last = awake.outputs.next()
    assert not last.more and {len(piece.token_ids) for piece in last.pieces} == {1}
    assert [piece.request for piece in last.pieces] == list(range(2, 301))


def test_rows_with_logprobs_go_out_together(awake: Group) -> None:
    awake.join()
    numbers = range(1, 71)
    for number in numbers:
        awake.submit(number, logprobs=1)
    (a,) = byte_tokens("a")
    scored = np.array([record(3, -0.5, 1, (40, -0.5)) for _ in numbers])
    scored[:, 0] = numbers
    awake.result(*((number, 1, a) for number in numbers), logprobs=scored)
    output = awake.outputs.next()
    assert not output.more and [piece.request for piece in output.pieces] == list(numbers)
    assert all(piece.logprobs is not None and len(piece.logprobs) == 1 for piece in output.pieces)


def test_what_has_collected_goes_in_outputs_of_a_bounded_size(group: Group) -> None:
    group.join()
    group.submit(7, max_tokens=9000, logprobs=20)
    scored = np.array([record(3, -0.5, 1, *[(40, -0.5)] * 20)])
    steps = 5000
    first = []
    for _ in range(detokenizer.OUTPUT_CREDITS):  # One at a time: all credit, and hardly a token.
        group.result((7, 1, 40), logprobs=scored)
        first.append(group.outputs.next())
    for _ in range(steps - len(first)):
        group.result((7, 1, 40), logprobs=scored)
    assert group.outputs.silent()
    group.tell(Credit(1))
    second = group.outputs.next()
    assert group.outputs.silent()
    group.tell(Credit(detokenizer.OUTPUT_CREDITS))
    rest = []
    outputs = [*first, second]
    while sum(len(output.pieces[0].token_ids) for output in outputs + rest) < steps:
        rest.append(group.outputs.next())
    assert len(rest) >= 1
    sizes = [len(msgspec.msgpack.encode(output)) for output in outputs + rest]
    assert OUTPUT_BYTES / 2 < max(sizes) < 1.5 * OUTPUT_BYTES


def test_a_new_router_resets_the_group(group: Group) -> None:
    group.join()
    group.submit(1)
    for _ in range(detokenizer.OUTPUT_CREDITS + 3):
        group.result((1, 1, 40))
    # The router dies: what the group has sent is never read.
    group.router.close()
    group.outputs.close()
    group.router = Hub(group.spec.socket_path("router"), ToRouter)
    group.outputs = OutputReceiver(f"{group.spec.runtime_dir}/{OUTPUT_SOCKET}")
    tell_when_connected(group, Reset())
    messages = []
    deadline = time.monotonic() + DEADLINE_S
    while not any(isinstance(message, Joined) for message in messages):
        assert time.monotonic() < deadline
        messages += arrived(group.router)
    assert receive(group.scheduler) == [Reset()]
    group.result((1, 1, 40))
    requests = range(2, 2 + detokenizer.OUTPUT_CREDITS)
    seen = []
    for request in requests:
        group.submit(request)
        group.result((request, 1, 40))
        while request not in seen:
            seen += [piece.request for piece in group.outputs.next().pieces]
    # What was on its way to the dead router may come to the next one, before all else.
    assert [each for each in seen if each != 1] == list(requests)
    assert seen == sorted(seen)


def lose_scheduler(group: Group) -> None:
    """Until the detokenizer has noticed: it waits for a stop that would explain it."""
    group.join()
    group.scheduler.close()
    deadline = time.monotonic() + DEADLINE_S
    while not group.actor.stopping.is_awaited.wait(0.02):
        assert time.monotonic() < deadline
        group.tell(Abort(1))
    group.scheduler = Spoke(group.spec.socket_path("g0"), "another", ToScheduler)


def test_a_stopping_group_may_lose_its_scheduler_first(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detokenizer, "_STOP_GRACE_S", DEADLINE_S)
    lose_scheduler(group)
    group.running.stop()


def test_losing_the_scheduler_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detokenizer, "_STOP_GRACE_S", 0.01)
    group = Group(tmp_path)
    lose_scheduler(group)
    group.running.wait_for_end()
    assert isinstance(group.running.failure, PeerGone)
    group.router.close()
    group.scheduler.close()
