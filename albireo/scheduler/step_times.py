"""How long a step takes with so many prefill tokens, learned from the steps there were.

    step_us = base_us + token_us * tokens      tokens: of the chunks

What the decodes take is in the base, which follows the batch.  A least-squares
line through the last fifty steps or so, older ones fading.  Without prefill
there is nothing to learn of the slope, so it stays as it was; one slow step (a
page fault, a neighbour) counts as twice what was expected at most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_KEEP = 0.98  # of the weight of earlier steps, at each step
_LEAST_SPREAD = 64.0  # variance of the tokens below which the slope stays
_MOST_SURPRISE = 2.0
_TRUSTED_STEPS = 8
_FIRST_TOKENS = 128  # of a chunk beside decodes, before anything is known
_LEAST_TOKENS = 16  # a chunk gets these whatever the target, so that every prompt ends


@dataclass(slots=True)
class StepTimes:
    """base_us, token_us: the line; 0.0 while nothing is known."""

    base_us: float = 0.0
    token_us: float = 0.0
    steps: int = 0
    _last_decode_us: float = math.inf  # without prefill
    _most_tokens: int = 0
    _weight: float = 0.0
    _tokens: float = 0.0
    _us: float = 0.0
    _tokens_sq: float = 0.0
    _tokens_us: float = 0.0

    def add(self, tokens: int, step_us: int) -> None:
        """A step with `tokens` prefill tokens has taken `step_us`."""
        us = float(step_us)
        if not tokens:
            self._last_decode_us = us
        if self.steps >= _TRUSTED_STEPS:
            us = min(us, _MOST_SURPRISE * self.expected_us(tokens))
        self.steps += 1
        self._most_tokens = max(self._most_tokens, tokens)
        self._weight = self._weight * _KEEP + 1.0
        self._tokens = self._tokens * _KEEP + tokens
        self._us = self._us * _KEEP + us
        self._tokens_sq = self._tokens_sq * _KEEP + tokens * tokens
        self._tokens_us = self._tokens_us * _KEEP + tokens * us
        mean_tokens, mean_us = self._tokens / self._weight, self._us / self._weight
        spread = self._tokens_sq / self._weight - mean_tokens * mean_tokens
        if spread >= _LEAST_SPREAD:
            together = self._tokens_us / self._weight - mean_tokens * mean_us
            # More tokens never take less, and no step less than nothing.
            self.token_us = min(max(together / spread, 0.0), mean_us / mean_tokens)
        self.base_us = max(0.0, mean_us - self.token_us * mean_tokens)

    def expected_us(self, tokens: int) -> float:
        """What a step with so many prefill tokens should take."""
        return self.base_us + self.token_us * tokens

    def soonest_us(self, tokens: int) -> float:
        """The same, but without prefill no more than the last such step took: what is expected
        follows a shrinking batch slowly."""
        expected = self.expected_us(tokens)
        return expected if tokens else min(expected, self._last_decode_us)

    def chunk_tokens(self, target_us: float) -> int:
        """Prefill tokens that the next step may have, to stay below the target.

        Never more than twice the most there ever were: a line is trusted where
        it was measured.
        """
        if self.base_us >= target_us:
            return _LEAST_TOKENS
        trusted = max(_FIRST_TOKENS, 2 * self._most_tokens)
        if self.token_us <= 0.0:
            return trusted
        return max(_LEAST_TOKENS, min(trusted, int((target_us - self.base_us) / self.token_us)))
