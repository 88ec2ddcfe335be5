"""Sampling parameters of a request, and their validation.

Used by the client library (an early, local error), by the router (the
authority) and by the actors of a group (resolved values only).  A field that
is not listed here does not exist: decoding refuses unknown fields, so nothing
is ever accepted and ignored.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from .grammars import Grammar

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_TOKEN_ID = 2**31 - 1
MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_BIASED_TOKENS = 1024
MAX_ALLOWED_TOKENS = 4096
MAX_BAD_WORDS = 64
MAX_BAD_WORD_CHARS = 128
PRIORITIES = (-1000, 1000)
"""Of a request: from the first to go to the last."""


class ParameterError(ValueError):
    """A parameter of a request is out of its range; the text says which, and the range."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the tokens of one request are chosen and when it ends.

    max_tokens: most tokens to generate; None = 16 for `generate`, what is left
        of the context for `chat`.
    min_tokens: stop conditions are ignored before this many tokens.
    temperature: 0 = greedy; otherwise logits are divided by it.
    top_k: keep the k best tokens; 0 = all.
    top_p: keep the smallest set of best tokens whose mass reaches it; 1 = all.
    min_p: keep tokens with at least this share of the best one's probability.
    repetition_penalty: logits of tokens in prompt or output are divided by it where
        positive, multiplied where negative; 1 = off.
    presence_penalty: subtracted from the logits of tokens in the output; 0 = off.
    frequency_penalty: the same, for each time the token is in it.
    logit_bias: added to the logits of these tokens (up to 1,024), -100 to 100.
    allowed_token_ids: no other token is generated (up to 4,096); None = all are.
    bad_words: texts that are not generated (up to 64).
    n: answers to the same prompt; the seed of the i-th is seed + i.
    logprobs: report the log-probability of every token, from the model's own
        distribution before all of the above, and of so many best ones; None = no.
    prompt_logprobs: the same for the tokens of the prompt but the first.
    seed: of the request's random stream; None = chosen by the router.
    stop: texts that end the answer (up to 16).
    stop_token_ids: token ids that end it, besides the model's own end tokens.
    include_stop_str_in_output: keep the matched stop string in the text.
    ignore_eos: the model's own end tokens do not end the answer, unless a grammar or tools bind it.
    skip_special_tokens: leave special tokens out of the text.
    grammar: what the answer has to look like; None = free text.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    grammar: Grammar | None = None

    def validate(self) -> None:
        """Raises ParameterError when a value is out of its range."""
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ParameterError(
                "max_tokens", f"max_tokens must be at least 1, not {self.max_tokens}"
            )
        if self.min_tokens < 0:
            raise ParameterError(
                "min_tokens", f"min_tokens must be at least 0, not {self.min_tokens}"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ParameterError(
                "min_tokens",
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})",
            )
        _require_range("temperature", self.temperature, 0.0, 100.0)
        if not 0 <= self.top_k <= MAX_TOKEN_ID:
            raise ParameterError("top_k", f"top_k must be 0 (off) or at least 1, not {self.top_k}")
        _require_range("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise ParameterError("top_p", "top_p must be above 0 and at most 1, not 0")
        _require_range("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise ParameterError("seed", f"seed must fit in 64 bits, not {self.seed}")
        # Below, a logit over it would not be finite any more.
        _require_range("repetition_penalty", self.repetition_penalty, 1e-6, 100.0)
        _require_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if not 1 <= self.n <= MAX_CHOICES:
            raise ParameterError("n", f"n must be between 1 and {MAX_CHOICES}, not {self.n}")
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None and not 0 <= count <= MAX_LOGPROBS:
                raise ParameterError(
                    name, f"{name} must be between 0 and {MAX_LOGPROBS}, not {count}"
                )
        if self.grammar is not None and (fault := self.grammar.fault()) is not None:
            raise ParameterError("grammar", f"grammar: {fault}")
        self._validate_edits()
        self._validate_stops()

    def _validate_edits(self) -> None:
        _require_at_most("logit_bias", len(self.logit_bias), MAX_BIASED_TOKENS, "tokens")
        for token, bias in self.logit_bias.items():
            _require_range(f"logit_bias[{token}]", bias, -100.0, 100.0)
            _require_token("logit_bias", token)
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise ParameterError(
                    "allowed_token_ids", "allowed_token_ids is empty: nothing could be generated"
                )
            _require_at_most(
                "allowed_token_ids", len(self.allowed_token_ids), MAX_ALLOWED_TOKENS, "tokens"
            )
            for token in self.allowed_token_ids:
                _require_token("allowed_token_ids", token)
        _require_at_most("bad_words", len(self.bad_words), MAX_BAD_WORDS, "texts")
        for text in self.bad_words:
            if not 1 <= len(text) <= MAX_BAD_WORD_CHARS:
                raise ParameterError(
                    "bad_words",
                    f"a bad word must have 1 to {MAX_BAD_WORD_CHARS} characters, not {len(text)}",
                )

    def _validate_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ParameterError(
                "stop", f"at most {MAX_STOP_STRINGS} stop strings are allowed, not {len(self.stop)}"
            )
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_STRING_CHARS:
                raise ParameterError(
                    "stop",
                    f"a stop string must have 1 to {MAX_STOP_STRING_CHARS} characters, "
                    f"not {len(text)}",
                )
        _require_at_most(
            "stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKEN_IDS, "stop token ids"
        )
        for token in self.stop_token_ids:
            _require_token("stop_token_ids", token)


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the makers of a model advise, for requests that do not say otherwise; None: nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def fields(self) -> dict[str, Any]:
        """Fields of SamplingParams: those that are advised."""
        every = msgspec.structs.asdict(self)
        return {name: value for name, value in every.items() if value is not None}


def _require_range(name: str, value: float, low: float, high: float) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise ParameterError(name, f"{name} must be between {low:g} and {high:g}, not {value}")


def _require_at_most(name: str, count: int, most: int, what: str) -> None:
    if count > most:
        raise ParameterError(name, f"at most {most} {what} are allowed in {name}, not {count}")


def _require_token(name: str, token: int) -> None:
    if not 0 <= token <= MAX_TOKEN_ID:
        raise ParameterError(name, f"a token id in {name} must be at least 0, not {token}")
