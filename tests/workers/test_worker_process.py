"""The worker's loop over real rings, on the `sim` device: plans in, results out, ways to leave."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from albireo.ipc.actor import NUM_BLOCKS, SWAP_BLOCK_NS
from albireo.ipc.config import ActorSpec
from albireo.ipc.plan import FLAG_STOP, ResultView, write_plan
from albireo.ipc.ring import RingReader, RingTimeout, RingWriter, create_ring
from albireo.ipc.rings import plan_ring, result_ring
from albireo.ipc.shared_memory import WORDS_PER_LINE, create, map_memory
from albireo.ipc.simulated import sim_token
from albireo.workers.engine import process
from albireo.workers.engine.process import main
from albireo.workers.engine.results import ResultWriter
from albireo.workers.engine.sim import SimEngine
from albireo.workers.engine.step import StepResult, WarmedUp
from albireo.workers.parallel.canary import INTERVAL, Canary, RanksDisagree, canary_bytes

from .. import specs
from ..plans import sections_of
from .engine_driver import ENGINE

MODEL = msgspec.structs.replace(specs.MODEL, hidden_size=48, tp_degrees=(1, 3))
SIM = msgspec.structs.replace(ENGINE, device="sim", sim_step_ms=1.0, step_timeout_s=0.3)
EMPTY = np.zeros(0, np.int32)


class Group:
    """A worker's surroundings, the worker being a thread of this process."""

    def __init__(self, rank: int = 0, **changes: Any) -> None:
        self.engine = msgspec.structs.replace(SIM, **changes)
        self.fds = {
            "plan.memory": create_ring(plan_ring(0, self.engine)),
            "result.memory": create_ring(result_ring(0, self.engine)),
            "result.event.scheduler": os.eventfd(0, os.EFD_NONBLOCK),
            "result.event.detokenizer": os.eventfd(0, os.EFD_NONBLOCK),
        }
        if self.engine.tp > 1:
            size = canary_bytes(self.engine.tp, self.engine.max_num_seqs)
            self.fds["canary.memory"] = create("canary", size)
        self.plans = RingWriter(plan_ring(0, self.engine), self.fds["plan.memory"])
        self.results = {
            reader: RingReader(result_ring(0, self.engine), self.fds["result.memory"], reader)
            for reader in ("scheduler", "detokenizer")
        }
        self.phases: list[str] = []
        self.is_ready = threading.Event()
        self.actor: Any = SimpleNamespace(
            spec=self._spec(rank),
            phase=self.phases.append,
            ready=self.is_ready.set,
            stopping=threading.Event(),
            detail={},
            answer_ping=lambda step: None,
        )
        self._step = 0

    def _spec(self, rank: int) -> ActorSpec:
        return ActorSpec(
            role="worker",
            name=f"g0.worker{rank}",
            node="test",
            incarnation=0,
            runtime_dir="",
            threads=1,
            log_level="info",
            model=MODEL,
            engine=self.engine,
            group=0,
            rank=rank,
        )

    def start(self) -> Future[None]:
        """Starts the worker; the future has its end."""
        future: Future[None] = Future()

        def run() -> None:
            try:
                main(self.actor, self.fds, None)
                future.set_result(None)
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        assert self.is_ready.wait(10)
        return future

    def plan(self, flags: int = 0, **sections: Any) -> int:
        """Publishes a plan and returns its step."""
        self._step += 1
        frame = self.plans.reserve(5.0)
        self.plans.publish(write_plan(frame, self._step, flags, sections_of(**sections)))
        return self._step

    def result(self, reader: str) -> tuple[int, list[list[int]], int, int]:
        """(step, rows, step_us, forward_us) of the next result."""
        view = ResultView(self.results[reader].wait(5.0))
        answer = view.step, view.rows.tolist(), view.step_us, view.forward_us
        self.results[reader].release()
        return answer

    def close(self) -> None:
        self.actor.stopping.set()
        for fd in self.fds.values():
            os.close(fd)


@pytest.fixture
def make_group() -> Iterator[Callable[..., Group]]:
    groups: list[Group] = []

    def make(**changes: Any) -> Group:
        groups.append(Group(**changes))
        return groups[-1]

    yield make
    for group in groups:
        group.close()


TAKE = [[2, 77, 5, 0, 0, 0, 0, 0, 3, 0]]


def test_every_plan_gets_a_result_that_both_readers_see(make_group: Callable[..., Group]) -> None:
    group = make_group()
    worker = group.start()
    steps = [group.plan(take=TAKE, chunk=[[2, 0, 3, 1]], chunk_token=[1, 2, 3])]
    for _ in range(10):
        steps.append(group.plan(decode=[2]))
        expected = [[77, 1, sim_token(5, len(steps) + 1, MODEL.vocab_size)]]
        for reader in ("scheduler", "detokenizer"):
            step, rows, step_us, forward_us = group.result(reader)
            assert (step, rows) == (steps[-2], expected)
            assert step_us > 0
            assert forward_us == 1000
    group.plan(flags=FLAG_STOP)
    worker.result(5.0)
    for fd in ("result.event.scheduler", "result.event.detokenizer"):
        assert os.eventfd_read(group.fds[fd]) == 12


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (WarmedUp(), {}),
        (WarmedUp(5000), {SWAP_BLOCK_NS: 5000}),
        (WarmedUp(5000, 77), {SWAP_BLOCK_NS: 5000, NUM_BLOCKS: 77}),
    ],
)
def test_what_it_finds_out_of_itself_is_said_when_it_is_ready(
    make_group: Callable[..., Group],
    monkeypatch: pytest.MonkeyPatch,
    found: WarmedUp,
    said: dict[str, int],
) -> None:
    monkeypatch.setattr(SimEngine, "warm_up", lambda engine: found)
    group = make_group()
    group.start()
    assert group.actor.detail == said


class LateReader(SimEngine):
    """Reads its newest plan until the next one comes."""

    def plans_in_use(self) -> int:
        return 1


def test_a_frame_is_held_while_its_plan_is_in_use(
    make_group: Callable[..., Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "SimEngine", LateReader)
    group = make_group()
    worker = group.start()
    words = map_memory(group.fds["plan.memory"]).words
    released, taken = (2 * WORDS_PER_LINE + word for word in (0, 1))
    for count in range(1, 12):
        step = group.plan()
        assert group.result("scheduler")[0] == group.result("detokenizer")[0] == step
        deadline = time.monotonic() + 5
        while words[released] < count - 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert (words[released], words[taken]) == (count - 1, count)
    group.plan(flags=FLAG_STOP)
    worker.result(5.0)


def test_the_last_plan_ends_the_worker_after_its_result(make_group: Callable[..., Group]) -> None:
    group = make_group()
    worker = group.start()
    step = group.plan(flags=FLAG_STOP)
    worker.result(5.0)
    assert group.result("scheduler")[:2] == (step, [])


def test_an_idle_worker_waits_longer_than_a_step_may_take(
    make_group: Callable[..., Group],
) -> None:
    group = make_group(step_timeout_s=0.01)
    worker = group.start()
    with pytest.raises(TimeoutError):
        worker.result(0.6)
    group.plan(flags=FLAG_STOP)
    worker.result(5.0)


def test_an_idle_worker_sees_that_it_should_stop(make_group: Callable[..., Group]) -> None:
    group = make_group()
    worker = group.start()
    group.actor.stopping.set()
    worker.result(5.0)


def test_results_that_nobody_takes_are_a_fault_that_names_the_reader(
    make_group: Callable[..., Group],
) -> None:
    group = make_group()
    worker = group.start()
    for _ in range(5):
        group.plan()
    with pytest.raises(RingTimeout, match="scheduler"):
        worker.result(5.0)


def test_a_plan_that_contradicts_the_slots_ends_the_worker(
    make_group: Callable[..., Group],
) -> None:
    group = make_group()
    worker = group.start()
    group.plan(take=TAKE, chunk=[[2, 1, 2, 0]], chunk_token=[1, 2])
    with pytest.raises(ValueError, match="starts at position 1"):
        worker.result(5.0)


def test_only_rank_0_writes_results(make_group: Callable[..., Group]) -> None:
    group = make_group(rank=1, tp=2)
    worker = group.start()
    first = RingReader(plan_ring(0, group.engine), group.fds["plan.memory"], "worker0")
    group.plan(take=TAKE, chunk=[[2, 0, 3, 1]], chunk_token=[1, 2, 3])
    group.plan(flags=FLAG_STOP)
    worker.result(5.0)
    assert first.poll() is not None
    assert group.results["scheduler"].poll() is None


def test_ranks_are_compared_behind_the_result() -> None:
    group = Group(tp=3)
    spec = group.actor.spec
    writer = ResultWriter(spec, group.fds)
    other = Canary(group.fds["canary.memory"], 1, 3, spec.engine.max_num_seqs)
    rows = np.array([[7, 1, 11]], np.int32)
    other.check(INTERVAL, rows + np.array([0, 0, 1], np.int32))
    writer.deliver(INTERVAL, StepResult(rows, 5), 9)
    assert group.result("scheduler")[0] == INTERVAL
    with pytest.raises(RanksDisagree):
        writer.deliver(2 * INTERVAL, StepResult(rows, 5), 9)
    assert group.result("scheduler")[:2] == (2 * INTERVAL, rows.tolist())
