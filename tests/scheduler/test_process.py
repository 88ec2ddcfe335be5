"""The scheduler's main loop over real rings and a real socket, in a thread."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from albireo.ipc.config import ActorSpec, EngineConfig
from albireo.ipc.link import Hub
from albireo.ipc.messages import (
    Abort,
    FromScheduler,
    Joined,
    Processed,
    Refused,
    Reset,
    SchedulerStats,
)
from albireo.ipc.plan import FLAG_STOP, TAKE_REQUEST, PlanView, ResultView, write_result
from albireo.ipc.ring import RingReader, RingTimeout, RingWriter, create_ring
from albireo.ipc.rings import plan_ring, result_ring
from albireo.ipc.wakefulness import await_news
from albireo.scheduler import process
from albireo.scheduler.kv_memory import KVMemory
from albireo.scheduler.process import main

from .. import specs
from .fake_worker import FakeWorker
from .submissions import VOCAB_SIZE, expected_end, submission

WAIT_S = 10.0
ENGINE = msgspec.structs.replace(
    specs.ENGINE, block_size=4, num_blocks=16, max_num_seqs=4, max_num_batched_tokens=32,
    step_timeout_s=WAIT_S,
)  # fmt: skip


class FakeActor:
    """Stands in for ipc.actor.Actor, which needs a supervisor."""

    def __init__(self, runtime_dir: str, engine: EngineConfig) -> None:
        self.spec = ActorSpec(
            role="scheduler",
            name="g0.scheduler",
            node="n",
            incarnation=3,
            runtime_dir=runtime_dir,
            threads=1,
            log_level="info",
            model=msgspec.structs.replace(specs.MODEL, vocab_size=VOCAB_SIZE),
            engine=engine,
            group=0,
        )
        self.stopping = threading.Event()
        self.stop_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.ping_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.is_ready = threading.Event()
        self.fatal_message: str | None = None

    def ready(self) -> None:
        self.is_ready.set()

    def answer_ping(self, step: int) -> None:
        pass

    def fatal(self, message: str, *, hung: bool) -> None:
        assert hung
        self.fatal_message = message
        self.stop()

    def stop(self) -> None:
        self.stopping.set()
        os.eventfd_write(self.stop_fd, 1)


class Harness:
    """The scheduler's neighbours, driven by the test: hub, worker 0, the result ring's readers."""

    def __init__(self, runtime_dir: str, step_timeout_s: float, async_output: bool = True) -> None:
        engine = msgspec.structs.replace(
            ENGINE, step_timeout_s=step_timeout_s, async_output=async_output
        )
        self.actor = FakeActor(runtime_dir, engine)
        plans, results = plan_ring(0, engine), result_ring(0, engine)
        event = os.eventfd(0, os.EFD_NONBLOCK)
        self.fds = {
            "plan.memory": create_ring(plans),
            "result.memory": create_ring(results),
            "result.event.scheduler": event,
        }
        self.plans = RingReader(plans, self.fds["plan.memory"], "worker0")
        self.results = RingWriter(results, self.fds["result.memory"], [event])
        self.detokenizer = RingReader(results, self.fds["result.memory"], "detokenizer")
        self.worker = FakeWorker(engine.block_size)
        self.step_us = 2000
        self.hub: Hub[FromScheduler] = Hub(self.actor.spec.socket_path("g0"), FromScheduler)
        self.told: list[FromScheduler] = []
        self.thread = threading.Thread(target=main, args=(self.actor, self.fds))
        self.thread.start()
        assert self.wait_for(Joined) == Joined("scheduler", 0, 3, os.getpid())
        assert self.actor.is_ready.wait(WAIT_S)

    def send(self, message) -> None:
        self.hub.send(b"scheduler", message)

    def wait_for(self, kind: type):
        """The first message of a kind that comes from now on."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            self.hub.socket.poll(100)
            for peer, message in self.hub.drain():
                assert peer == b"scheduler"
                self.told.append(message)
                if isinstance(message, kind):
                    return message
        raise AssertionError(f"no {kind.__name__} came; {self.told} did")

    def step(self) -> tuple[int, list[list[int]]]:
        """Carries out the next plan: (its flags, its rows)."""
        return self._carry_out(self.plans.wait(WAIT_S))

    def serve_until_finished(self, requests: int) -> SchedulerStats:
        """Carries out what is planned until so many requests have come to their end."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            if (frame := self.plans.poll()) is not None:
                self._carry_out(frame)
            self.hub.socket.poll(10)
            for _, message in self.hub.drain():
                if isinstance(message, SchedulerStats) and message.finished == requests:
                    return message
        raise AssertionError(f"{requests} requests did not come to their end")

    def _carry_out(self, frame: memoryview) -> tuple[int, list[list[int]]]:
        plan = PlanView(frame)
        flags = plan.flags
        if not flags:
            rows = self.worker.step(plan)
            frame = self.results.reserve(WAIT_S)
            self.results.publish(write_result(frame, plan.step, rows, self.step_us, 1500))
        self.plans.release()
        if flags:
            return flags, []
        rows = ResultView(self.detokenizer.wait(WAIT_S)).rows.tolist()
        self.detokenizer.release()
        return flags, rows

    def run_until_ended(self, request: int, tokens: int) -> list[int]:
        """Tokens of a request, from as many rows."""
        got: list[int] = []
        while len(got) < tokens:
            got += [token for number, _, token in self.step()[1] if number == request]
        return got

    def close(self) -> None:
        self.actor.stop()
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        self.hub.close()
        for fd in (*self.fds.values(), self.actor.stop_fd):
            os.close(fd)


@pytest.fixture
def step_timeout_s() -> float:
    """A test sets its own by parametrize."""
    return WAIT_S


@pytest.fixture
def harness(tmp_path, step_timeout_s: float) -> Iterator[Harness]:
    made = Harness(str(tmp_path), step_timeout_s)
    yield made
    made.close()


def test_every_block_is_looked_at_now_and_then_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One client that asks and asks again makes the group idle all the time."""
    looks: list[float] = []
    check = KVMemory.check

    def spy(memory: KVMemory) -> None:
        looks.append(time.monotonic())
        check(memory)

    monkeypatch.setattr(KVMemory, "check", spy)
    harness = Harness(str(tmp_path), WAIT_S)
    began = time.monotonic()
    for number in range(1, 6):
        harness.send(submission(number, prompt_len=5, max_tokens=2))
        harness.serve_until_finished(number)
    harness.close()
    assert 1 <= len(looks) <= 1 + (time.monotonic() - began) // 10


def test_requests_become_plans_and_results_end_them(harness: Harness) -> None:
    assert harness.wait_for(SchedulerStats).kv_blocks_total == 16
    submit = submission(7, prompt_len=5, max_tokens=6)
    harness.send(submit)
    harness.send(submission(8, prompt_len=60, max_tokens=60))
    refused = harness.wait_for(Refused)
    assert (refused.request, refused.code) == (8, "too_long")
    assert harness.run_until_ended(7, 6) == expected_end(submit)[1]
    # Statistics come at once when idleness begins.
    stats = harness.serve_until_finished(1)
    assert stats == SchedulerStats(
        running=0,
        waiting=0,
        kv_blocks_used=0,
        kv_blocks_total=16,
        preemptions=0,
        steps=6,
        prompt_tokens=5,
        generated_tokens=6,
        finished=1,
        step_ms_mean=stats.step_ms_mean,
        forward_ms_mean=stats.forward_ms_mean,
        prefix_queried_tokens=5,
        queue_counts=[0] * len(stats.queue_counts),
    )
    assert (stats.step_ms_mean, stats.forward_ms_mean) == (2.0, 1.5)


def test_who_comes_while_a_long_step_runs_is_in_the_next(harness: Harness) -> None:
    harness.step_us = 800_000
    harness.send(submission(1, prompt_len=2, max_tokens=20))
    harness.step()
    assert not len(PlanView(harness.plans.wait(WAIT_S)).take)  # Planned before that was known.
    harness.plans.release()
    with pytest.raises(RingTimeout):
        harness.plans.wait(0.1)
    harness.send(submission(2, prompt_len=2, max_tokens=20))
    assert PlanView(harness.plans.wait(WAIT_S)).take[:, TAKE_REQUEST].tolist() == [2]
    harness.plans.release()


def test_it_stays_awake_for_the_first_result_behind_idleness(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_s: list[float] = []

    def spy(
        poller: zmq.Poller, ring: RingReader, awake_until_s: float, timeout_ms: int | None
    ) -> dict[Any, int]:
        left_s.append(awake_until_s - time.monotonic())
        return await_news(poller, ring, awake_until_s, timeout_ms)

    monkeypatch.setattr(process, "await_news", spy)
    engine = msgspec.structs.replace(ENGINE, spin_us=50)
    monkeypatch.setattr(f"{__name__}.ENGINE", engine)
    harness = Harness(str(tmp_path), WAIT_S)
    try:
        harness.send(submission(1, max_tokens=2))
        harness.run_until_ended(1, 2)
        harness.serve_until_finished(1)
        time.sleep(2 * engine.awake_s)
        left_s.clear()
        harness.send(submission(2, max_tokens=2))
        harness.plans.wait(WAIT_S)
        time.sleep(2 * engine.awake_s)
        assert max(left_s) > 0.0
    finally:
        harness.close()


def test_abort_and_reset_reach_the_policy(harness: Harness) -> None:
    for request in (1, 2, 3):
        harness.send(submission(request, max_tokens=50, prompt_len=2))
    harness.send(Abort(2))
    harness.step()
    harness.send(Reset())
    stats = harness.serve_until_finished(3)
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    assert stats.generated_tokens < 3 * 50


def test_a_stop_is_passed_on_to_the_workers(harness: Harness) -> None:
    harness.actor.stop()
    assert harness.step() == (FLAG_STOP, [])
    harness.thread.join(WAIT_S)
    assert not harness.thread.is_alive()
    with pytest.raises(RingTimeout):
        harness.plans.wait(0.01)


@pytest.mark.parametrize("step_timeout_s", [0.3])
def test_a_step_without_a_result_is_fatal_and_named(harness: Harness) -> None:
    harness.send(submission(1, max_tokens=9))
    harness.step()
    harness.step()
    began = time.monotonic()
    harness.thread.join(WAIT_S)
    assert not harness.thread.is_alive()
    assert 0.2 < time.monotonic() - began < 5
    assert harness.actor.fatal_message is not None
    assert re.fullmatch(
        r"step 3 has no result after [\d.]+ s \(the limit is 0\.3 s\): a worker hangs",
        harness.actor.fatal_message,
    )


@pytest.mark.parametrize("step_timeout_s", [0.5])
def test_a_detokenizer_that_takes_no_results_is_named(harness: Harness) -> None:
    harness.send(submission(1, max_tokens=20))
    for step in range(1, result_ring(0, ENGINE).frames + 1):
        plan = PlanView(harness.plans.wait(WAIT_S))
        frame = harness.results.reserve(WAIT_S)
        harness.results.publish(write_result(frame, step, harness.worker.step(plan), 2000, 1500))
        harness.plans.release()
    with pytest.raises(RingTimeout):
        harness.results.reserve(0.0)
    harness.thread.join(WAIT_S)
    assert not harness.thread.is_alive()
    assert harness.actor.fatal_message is not None
    assert re.fullmatch(
        r"step 5 has no result after [\d.]+ s \(the limit is 0\.5 s\): a reader of results hangs: "
        rf"all 4 frames are in use until frame 1 is released by detokenizer \(pid {os.getpid()}; "
        r"released 0\)",
        harness.actor.fatal_message,
    )


@pytest.mark.parametrize("step_timeout_s", [0.3])
def test_the_first_step_has_a_deadline_too(harness: Harness) -> None:
    """Workers are ready before a scheduler is started."""
    harness.send(submission(1, max_tokens=9))
    harness.thread.join(WAIT_S)
    assert not harness.thread.is_alive()
    assert harness.actor.fatal_message is not None
    assert re.match(r"step 1 has no result after 0\.[34]", harness.actor.fatal_message)


@pytest.mark.parametrize("step_timeout_s", [1.0])
def test_an_idle_group_has_no_deadline(harness: Harness) -> None:
    time.sleep(1.2)
    submit = submission(1, max_tokens=2)
    harness.send(submit)
    assert harness.run_until_ended(1, 2) == expected_end(submit)[1]
    assert harness.actor.fatal_message is None


def test_without_asynchronous_output_a_plan_waits_for_the_text_of_the_last(tmp_path) -> None:
    harness = Harness(str(tmp_path), WAIT_S, async_output=False)
    try:
        submit = submission(1, max_tokens=3)
        harness.send(submit)
        for step in (1, 2, 3):
            assert len(harness.step()[1]) == 1
            with pytest.raises(RingTimeout):
                harness.plans.wait(0.1)
            harness.send(Processed(step))
        assert harness.serve_until_finished(1).steps == 3
    finally:
        harness.close()


def test_output_that_is_never_processed_is_fatal_and_named(tmp_path) -> None:
    harness = Harness(str(tmp_path), 0.3, async_output=False)
    try:
        harness.send(submission(1, max_tokens=3))
        harness.step()
        harness.thread.join(WAIT_S)
        assert not harness.thread.is_alive()
        assert harness.actor.fatal_message is not None
        assert re.match(
            r"the output of step 1 has not been processed after [\d.]+ s \(the limit is 0\.3 s\)",
            harness.actor.fatal_message,
        )
    finally:
        harness.close()
