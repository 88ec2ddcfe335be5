"""Steps under way on the GPU: their pinned memory and events, and who waits for them.

The worker's loop launches a step and goes on; what is still needed of it when
it ends is in its Flight.  A thread of its own (Collector) waits for one flight
after the other, asleep where cores are few, and delivers the result: on rank 0
into the result ring.  Flights are made once and used in turn.
A flight that does not come back in time is a hung step.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import numpy as np
import torch

from ....ipc.plan import LOGPROB_WORDS, MAX_PLAN_SCORES, Int32Array
from ...grammar.matchers import GrammarRows
from ...kernels.cpu.step_end import fill_rows
from ..step import StepResult
from .event_waiter import EventWaiter
from .gpu_clock import FlightRecorder
from .pinned import staging_words

Deliver = Callable[[int, StepResult, int], None]
"""(step, result, step_us) of each step, in order, from the collector's thread."""

_NOTHING = np.empty(0, np.int32)
_NO_LOGPROBS = np.empty((0, LOGPROB_WORDS), np.int32)

Fail = Callable[[str], None]
"""Ends the process with a reason for the user."""


class Flight:
    """One step, from the launch of its plan to the delivery of its result.

    words: pinned, the plan where it is staged.  ids, at ids_address: pinned [max_num_seqs]
    int32, the sampled tokens.  records, score_records: pinned [rows, LOGPROB_WORDS] int32, of the
    sampling rows and of the scored ones, request and position missing.  All are
    also there as numpy arrays.  count: sampling rows.
    grammars: those of them that have one.  begun, forwarded, sampled:
    events in the step's stream, before its first kernel, behind the forward pass, behind the last.
    done: in the stream of the copies to the host, behind them.  launched_ns: just before `begun`
    was given to the stream, CLOCK_MONOTONIC.  spins: who waits for `done` takes a core, and knows
    some 50 us sooner than one that has to wake up, and at steadier times.
    """

    def __init__(self, plan_words: int, max_num_seqs: int, spins: bool) -> None:
        self.grammars: GrammarRows | None = None
        self.words = staging_words(plan_words)
        self.ids = staging_words(max_num_seqs)
        self.records = staging_words(max_num_seqs * LOGPROB_WORDS).view(-1, LOGPROB_WORDS)
        self.score_records = staging_words(MAX_PLAN_SCORES * LOGPROB_WORDS).view(-1, LOGPROB_WORDS)
        self.ids_address = self.ids.data_ptr()
        self._words_array: Int32Array = self.words.numpy()
        self.ids_array: Int32Array = self.ids.numpy()
        self._records_array: Int32Array = self.records.numpy()
        self._scores_array: Int32Array = self.score_records.numpy()
        self._rows = np.zeros((max_num_seqs, 3), np.int32)
        self.begun = torch.cuda.Event(enable_timing=True)
        self.forwarded = torch.cuda.Event(enable_timing=True)
        self.sampled = torch.cuda.Event(enable_timing=True)
        self.done = torch.cuda.Event(blocking=not spins)
        self.step = 0
        self.count = 0
        self.launched_ns = 0
        self._asking = self._asked_at = self._scored = self._scored_at = _NOTHING

    def begin(self, step: int, requests: Int32Array) -> None:
        """Keeps what the step's result needs of its plan."""
        self.step = step
        self.grammars = None
        self.count = len(requests)
        self._asking = self._asked_at = self._scored = self._scored_at = _NOTHING
        self._rows[: self.count, 0] = requests

    def stage(self, words: Int32Array) -> int:
        """Takes the plan into pinned memory; returns where it is."""
        self._words_array[: len(words)] = words
        return self.words.data_ptr()

    def expect_logprobs(self, rows: Int32Array, positions: Int32Array) -> None:
        """These of the sampling rows ask for logprobs; positions: of their tokens."""
        self._asking, self._asked_at = rows, positions

    def expect_scores(self, requests: Int32Array, positions: Int32Array) -> None:
        """Tokens of prompts are scored: whose, and at which position each is."""
        self._scored, self._scored_at = requests, positions

    def result(self, forward_us: int) -> StepResult:
        """The rows (request, count, token) and the logprobs, once `done` has happened."""
        if self.grammars is not None:
            self.grammars.accept(self.ids_array[: self.count])
        fill_rows(self.ids_array, self._rows, self.count)
        rows = self._rows[: self.count]
        return StepResult(rows=rows, forward_us=forward_us, logprobs=self._logprobs(rows))

    def _logprobs(self, rows: Int32Array) -> Int32Array:
        """[n, LOGPROB_WORDS]: of the sampled tokens, then of the scored ones."""
        if not len(self._asking) and not len(self._scored):
            return _NO_LOGPROBS
        # A row without a token has nothing to report.
        there = rows[self._asking, 1] > 0
        asking, scored = self._asking[there], len(self._scored)
        found = np.concatenate([self._records_array[asking], self._scores_array[:scored]])
        found[:, 0] = np.concatenate([rows[asking, 0], self._scored])
        found[:, 1] = np.concatenate([self._asked_at[there], self._scored_at])
        return found


class Collector:
    """The flights, and the thread that waits for them, on the maker's current GPU.

    timeout_s: how long a step may take.
    """

    def __init__(
        self,
        flights: list[Flight],
        deliver: Deliver,
        fail: Fail,
        timeout_s: float,
        recorder: FlightRecorder,
    ) -> None:
        self._device = torch.cuda.current_device()
        self._deliver = deliver
        self._fail = fail
        self._timeout_s = timeout_s
        self._recorder = recorder
        self._waiter = EventWaiter()
        self._free: queue.SimpleQueue[Flight] = queue.SimpleQueue()
        self._under_way: queue.SimpleQueue[Flight | None] = queue.SimpleQueue()
        for flight in flights:
            self._free.put(flight)
        self._count = len(flights)
        self._thread = threading.Thread(target=self._run, name="collector", daemon=True)
        self._thread.start()

    def take(self) -> Flight:
        """A free flight; give_back or send it.  Raises TimeoutError when none comes back."""
        try:
            return self._free.get(timeout=self._timeout_s)
        except queue.Empty:
            raise TimeoutError(
                f"{self._count} steps are under way on GPU {self._device} and none has ended "
                f"within {self._timeout_s:g} s: the GPU hangs, or a rank of the group is missing"
            ) from None

    def send(self, flight: Flight) -> None:
        """The step is launched, `done` recorded: its result is delivered when it is there."""
        self._under_way.put(flight)

    def give_back(self, flight: Flight) -> None:
        """The step is over and nobody wants its result."""
        self._free.put(flight)

    def finish(self) -> None:
        """Returns when every result is delivered; nothing may be sent afterwards."""
        self._under_way.put(None)
        self._thread.join(self._timeout_s)

    def _run(self) -> None:
        step = 0
        # Kept until the next has landed: the gap between the two is measured from its `sampled`.
        before: Flight | None = None
        try:
            torch.cuda.set_device(self._device)
            while (flight := self._under_way.get()) is not None:
                step = flight.step
                ended = before.sampled if before is not None else None
                times = self._waiter.wait(
                    ended, flight.begun, flight.forwarded, flight.sampled, flight.done
                )
                seen_ns = time.monotonic_ns()
                self._deliver(step, flight.result(times.forward_us), times.step_us)
                self._recorder.landed(flight, times, seen_ns)
                if before is not None:
                    self._free.put(before)
                before = flight
        except Exception as error:
            self._fail(f"step {step} on GPU {self._device} of the group failed: {error}")
