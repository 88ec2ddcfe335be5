"""The scheduler process: moves messages, results and plans; decides nothing.

    detokenizer's hub ── Submit, Abort, Reset ──▶ ┌───────────┐ ── plan ring ──▶ workers
                      ◀── Refused, stats ──────── │ Scheduler │ ◀── result ring ── worker 0
                                                  └───────────┘

One thread, one poller.  Every step in flight has a deadline; when it passes,
the process gives up, and the whole group with it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Mapping

import zmq

from albireo.ipc.actor import Actor
from albireo.ipc.link import Spoke
from albireo.ipc.messages import (
    Abort,
    Joined,
    Processed,
    Reset,
    SchedulerStats,
    Submit,
    ToScheduler,
)
from albireo.ipc.plan import FLAG_STOP, PlanSections, ResultView, write_plan
from albireo.ipc.ring import RingReader, RingTimeout, RingWriter
from albireo.ipc.rings import plan_ring, result_ring
from albireo.ipc.stages import Stage
from albireo.ipc.timeline import NO_STEP, Recorder
from albireo.ipc.wakefulness import await_news

from .limits import Limits
from .queue_times import QueueTimes
from .scheduler import Scheduler

_STATS_INTERVAL_S = 1.0
_CHECK_INTERVAL_S = 10.0
"""Between two looks at every KV block, at least: one takes milliseconds where there are many."""


def main(actor: Actor, fds: Mapping[str, int]) -> None:
    """Runs a group's scheduler until the supervisor asks it to stop.

    fds: "plan.memory", "result.memory" (the rings), "result.event.scheduler".
    """
    loop = _Loop(actor, fds)
    actor.ready()
    loop.run()


class _Loop:
    def __init__(self, actor: Actor, fds: Mapping[str, int]) -> None:
        spec, engine = actor.spec, actor.spec.engine
        self._actor = actor
        self._timeline = Recorder.of(fds)
        self._scheduler = Scheduler(Limits.of(engine))
        self._scheduler.swap_block_us = engine.swap_block_ns / 1e3
        self._async_output = engine.async_output
        self._processed = 0  # the last step whose output the detokenizer has dealt with
        self._plans = RingWriter(plan_ring(spec.group, engine), fds["plan.memory"])
        self._results = RingReader(
            result_ring(spec.group, engine),
            fds["result.memory"],
            "scheduler",
            event=fds["result.event.scheduler"],
        )
        self._link: Spoke[Submit | Abort | Reset] = Spoke(
            spec.socket_path(f"g{spec.group}"), "scheduler", ToScheduler
        )
        self._link.send(Joined(spec.role, spec.group, spec.incarnation, os.getpid()))
        self._poller = zmq.Poller()
        for source in (
            self._link.socket, self._results.fileno(), actor.stop_fd, actor.ping_fd
        ):  # fmt: skip
            self._poller.register(source, zmq.POLLIN)
        self._awake_s = engine.awake_s
        self._awake_until_s = 0.0
        self._step_timeout_s = engine.step_timeout_s
        self._step_began = 0.0  # when the oldest step in flight could begin, monotonic
        self._plan_at_s = math.inf  # When the next plan is due that waits for more requests.
        self._times = _StepTimes()
        self._queue_times = QueueTimes()
        self._stats_due = self._check_due = 0.0
        self._idle = False
        self._idle_since_ns = time.monotonic_ns()

    def run(self) -> None:
        while not self._actor.stopping.is_set():
            self._publish_plans()
            self._report(time.monotonic())
            awake_until_s = min(self._awake_until_s, self._plan_at_s)
            wait_ms = self._wait_ms(max(time.monotonic(), awake_until_s))
            await_news(self._poller, self._results, awake_until_s, wait_ms)
            self._take_results()
            self._take_messages()
            self._check_deadline(time.monotonic())
            self._actor.answer_ping(self._scheduler.counters.steps)
        self._publish_stop()
        self._link.close()

    def _publish_plans(self) -> None:
        """Every plan that can be made now; the ring has room for all steps in flight."""
        scheduler = self._scheduler
        while True:
            if self._awaits_output() or self._waits_for_more(time.monotonic()):
                return
            first = scheduler.oldest_step is None
            start_ns = time.monotonic_ns()
            plan = scheduler.plan()
            if plan is None:
                return
            frame = self._plans.reserve(self._step_timeout_s)
            self._plans.publish(write_plan(frame, plan.step, 0, plan.sections))
            if len(plan.sections.take):
                self._queue_times.planned(plan.sections.take, time.monotonic())
            sequences = len(plan.sections.chunk) + len(plan.sections.decode)
            self._timeline.record(Stage.PLAN, plan.step, start_ns, time.monotonic_ns(), sequences)
            if first:
                self._step_began = time.monotonic()
                # Few plans wait behind this one: its result is to be dealt with at once.
                self._awake_until_s = self._step_began + self._awake_s

    def _waits_for_more(self, now: float) -> bool:
        """The step that runs has long to go: see Scheduler.plan_after_us."""
        self._plan_at_s = math.inf
        due = self._step_began + self._scheduler.plan_after_us() / 1e6
        if now >= due:
            return False
        self._plan_at_s = due
        return True

    def _take_results(self) -> None:
        while (frame := self._results.poll()) is not None:
            start_ns = time.monotonic_ns()
            result = ResultView(frame)
            self._times.add(result.step_us, result.forward_us)
            self._scheduler.apply(result.step, result.rows, result.step_us)
            rows = len(result.rows)
            self._results.release()
            self._step_began = time.monotonic()
            self._awake_until_s = self._step_began + self._awake_s
            self._timeline.record(Stage.APPLY, result.step, start_ns, time.monotonic_ns(), rows)

    def _take_messages(self) -> None:
        start_ns, taken = time.monotonic_ns(), 0
        for message in self._link.drain():
            taken += 1
            match message:
                case Submit():
                    refused = self._scheduler.submit(message)
                    if refused is None:
                        self._queue_times.submitted(message)
                    else:
                        self._link.send(refused)
                case Abort(request):
                    self._scheduler.abort(request)
                    self._queue_times.gone(request)
                case Reset():
                    self._scheduler.reset()
                    self._queue_times.clear()
                case Processed(step):
                    self._processed = step
                    self._step_began = time.monotonic()
        if taken:
            step, end_ns = self._scheduler.next_step, time.monotonic_ns()
            self._timeline.record(Stage.REQUESTS, step, start_ns, end_ns, taken)

    def _awaits_output(self) -> bool:
        """Without asynchronous output: an earlier step's text has not been dealt with."""
        return not self._async_output and self._processed < self._scheduler.counters.steps

    def _check_deadline(self, now: float) -> None:
        step = self._scheduler.oldest_step
        if step is not None and now - self._step_began > self._step_timeout_s:
            full = self._results.why_full()
            self._actor.fatal(
                f"step {step} has no result after {now - self._step_began:.1f} s "
                f"(the limit is {self._step_timeout_s:g} s): "
                + (f"a reader of results hangs: {full}" if full else "a worker hangs"),
                hung=True,
            )
        if step is None and self._awaits_output() and now - self._step_began > self._step_timeout_s:
            self._actor.fatal(
                f"the output of step {self._scheduler.counters.steps} has not been processed after "
                f"{now - self._step_began:.1f} s (the limit is {self._step_timeout_s:g} s): "
                "the detokenizer hangs",
                hung=True,
            )

    def _wait_ms(self, now: float) -> int | None:
        """Until the next plan, deadline or stats; None, for ever, when nothing is to come."""
        if self._idle:
            return None
        until = min(self._stats_due, self._plan_at_s)
        if self._scheduler.oldest_step is not None or self._awaits_output():
            until = min(until, self._step_began + self._step_timeout_s)
        return max(0, math.ceil((until - now) * 1000))

    def _report(self, now: float) -> None:
        """Stats once a second while there is work, and once when it ends."""
        was_idle, self._idle = self._idle, self._scheduler.idle
        if was_idle and not self._idle:
            self._timeline.record(Stage.NO_WORK, NO_STEP, self._idle_since_ns, time.monotonic_ns())
        if self._idle and not was_idle:
            self._idle_since_ns = time.monotonic_ns()
            self._scheduler.check_idle(thoroughly=now >= self._check_due)
            if now >= self._check_due:
                self._check_due = now + _CHECK_INTERVAL_S
        elif self._idle or now < self._stats_due:
            return
        self._stats_due = now + _STATS_INTERVAL_S
        scheduler, counters = self._scheduler, self._scheduler.counters
        step_ms, forward_ms = self._times.take_means_ms()
        self._link.send(
            SchedulerStats(
                running=scheduler.running,
                waiting=scheduler.waiting,
                kv_blocks_used=scheduler.pool.num_blocks - scheduler.pool.free,
                kv_blocks_total=scheduler.pool.num_blocks,
                preemptions=counters.preemptions,
                steps=counters.steps,
                prompt_tokens=counters.prompt_tokens,
                generated_tokens=counters.generated_tokens,
                finished=counters.finished,
                step_ms_mean=step_ms,
                forward_ms_mean=forward_ms,
                prefix_queried_tokens=counters.prefix_queried_tokens,
                prefix_hit_tokens=counters.prefix_hit_tokens,
                swapped_out_blocks=counters.swapped_out_blocks,
                swapped_in_blocks=counters.swapped_in_blocks,
                waiting_by_priority=scheduler.waiting_by_priority,
                queue_counts=self._queue_times.histogram.counts,
                queue_sum_s=self._queue_times.histogram.total,
            )
        )

    def _publish_stop(self) -> None:
        """Tells the workers to leave.  Where the ring is full they hang, and are ended anyway."""
        with contextlib.suppress(RingTimeout):
            frame = self._plans.reserve(0.0)
            stop = write_plan(frame, self._scheduler.next_step, FLAG_STOP, PlanSections())
            self._plans.publish(stop)
            logging.debug("stop after step %d", self._scheduler.counters.steps)


class _StepTimes:
    """Means of the workers' times since they were last taken."""

    def __init__(self) -> None:
        self._steps = self._step_us = self._forward_us = 0

    def add(self, step_us: int, forward_us: int) -> None:
        self._steps += 1
        self._step_us += step_us
        self._forward_us += forward_us

    def take_means_ms(self) -> tuple[float, float]:
        """(step, forward), 0.0 without a step; begins anew."""
        steps = max(1, self._steps) * 1000.0
        means = self._step_us / steps, self._forward_us / steps
        self._steps = self._step_us = self._forward_us = 0
        return means
