"""A worker's way to hand out its results: rank 0 writes them to the result ring, others nowhere.

All ranks compare them from time to time.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...ipc.config import ActorSpec
from ...ipc.plan import write_result
from ...ipc.ring import RingWriter
from ...ipc.rings import result_ring
from ..parallel.canary import Canary
from .step import StepResult


class ResultWriter:
    """Used by one thread: the worker's loop, or the one that waits for the GPU."""

    def __init__(self, spec: ActorSpec, fds: Mapping[str, int]) -> None:
        self._timeout_s = spec.engine.step_timeout_s
        self._canary: Canary | None = None
        if spec.engine.tp > 1:
            self._canary = Canary(
                fds["canary.memory"], spec.rank, spec.engine.tp, spec.engine.max_num_seqs
            )
        self._ring: RingWriter | None = None
        if spec.rank == 0:
            self._ring = RingWriter(
                result_ring(spec.group, spec.engine),
                fds["result.memory"],
                (fds["result.event.scheduler"], fds["result.event.detokenizer"]),
                spec.engine.spin_us,
            )

    def deliver(self, step: int, result: StepResult, step_us: int) -> None:
        """Publishes the result, and compares behind that, for which no client waits.

        Raises RingTimeout when its readers do not take any, RanksDisagree as canary.py says.
        """
        if self._ring is not None:
            frame = self._ring.reserve(self._timeout_s)
            self._ring.publish(
                write_result(frame, step, result.rows, step_us, result.forward_us, result.logprobs)
            )
        if self._canary is not None:
            self._canary.check(step, result.rows)
