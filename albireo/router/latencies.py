"""How long requests take, as the router sees it: histograms of each group, for /metrics.

    arrived        first tokens            tokens      ...      end
       |---- TTFT ----|-- inter-token --|--|--|--|--|--|--|--|--|
       |------------------------- end to end -------------------|

Recorded behind each batch of deltas.
"""

from __future__ import annotations

from typing import Any

from albireo.ipc.histogram import WHOLE_REQUEST_S, Histogram

_SHORT_S = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5,
    1.0, 2.5,
)  # fmt: skip
_TOKENS = tuple(float(2**power) for power in range(14))


class StreamTimes:
    """Of one answer, in seconds of the loop's clock."""

    __slots__ = ("arrived", "first", "last", "tokens")

    def __init__(self, arrived: float) -> None:
        self.arrived = arrived
        self.first = 0.0
        self.last = 0.0
        self.tokens = 0


class GroupLatencies:
    """Histograms of the answers that one group gives."""

    def __init__(self) -> None:
        self.finished: dict[str, int] = {}
        """Ended answers by finish reason."""
        self._first_token = Histogram(WHOLE_REQUEST_S)
        self._inter_token = Histogram(_SHORT_S)
        self._per_token = Histogram(_SHORT_S)
        self._whole = Histogram(WHOLE_REQUEST_S)
        self._batch = Histogram(_TOKENS)
        self._of_step = 0  # tokens of parts that have come

    def tokens(self, times: StreamTimes, count: int, now: float) -> None:
        """`count` (at least 1) new tokens of an answer came at once."""
        if times.tokens:
            self._inter_token.record(now - times.last)
        else:
            times.first = now
            self._first_token.record(now - times.arrived)
        times.last = now
        times.tokens += count

    def batch(self, tokens: int, more: bool) -> None:
        """So many new tokens came with one step's output, or, with `more` to come, a part of it."""
        self._of_step += tokens
        if not more:
            self._batch.record(self._of_step)
            self._of_step = 0

    def cut_off(self) -> None:
        """The group has died: of a step that has come in part nothing more comes."""
        self._of_step = 0

    def end(self, times: StreamTimes, reason: str, now: float) -> None:
        """An answer has ended without an error."""
        self.finished[reason] = self.finished.get(reason, 0) + 1
        self._whole.record(now - times.arrived)
        if times.tokens > 1:
            self._per_token.record((times.last - times.first) / (times.tokens - 1))

    def tree(self) -> dict[str, Any]:
        """By the names that /metrics gives them (gateway/metrics.py)."""
        return {
            "time_to_first_token_seconds": self._first_token.tree(),
            "inter_token_latency_seconds": self._inter_token.tree(),
            "request_time_per_output_token_seconds": self._per_token.tree(),
            "e2e_request_latency_seconds": self._whole.tree(),
            "iteration_tokens_total": self._batch.tree(),
        }
