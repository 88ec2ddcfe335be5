"""From the fields of a request to SamplingParams, checked before anything is sent."""

from __future__ import annotations

import re
from typing import Any

from albireo.ipc.params import MAX_LOGPROBS, ParameterError, SamplingDefaults, SamplingParams

from .errors import HttpError, invalid
from .formats import grammar_of
from .ranges import TOKEN_ID_KEY
from .requests import ChatRequest, CompletionRequest

_SAME = (
    "n", "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "top_k", "min_p",
    "repetition_penalty", "min_tokens", "ignore_eos", "include_stop_str_in_output",
    "skip_special_tokens", "prompt_logprobs",
)  # fmt: skip
_NOTHING = SamplingDefaults()
_TUPLES = ("stop_token_ids", "bad_words", "allowed_token_ids")


def completion_params(
    asked: CompletionRequest, defaults: SamplingDefaults = _NOTHING
) -> SamplingParams:
    """defaults: of what is not asked for.  Raises HttpError (400).

    `echo` with `max_tokens` 0 asks for the prompt's log-probabilities alone: one
    token is made then, and not shown.  With `echo`, `logprobs` are the prompt's too.
    """
    fields = _common(asked, defaults)
    fields["logprobs"] = asked.logprobs
    if asked.max_tokens is not None:
        fields["max_tokens"] = 1 if scores_only(asked) else asked.max_tokens
    if asked.echo and asked.logprobs is not None:
        fields["prompt_logprobs"] = max(asked.logprobs, asked.prompt_logprobs or 0)
    return _checked(fields)


def scores_only(asked: CompletionRequest) -> bool:
    """Whether nothing is to be generated."""
    return bool(asked.echo) and asked.max_tokens == 0


def chat_params(asked: ChatRequest, defaults: SamplingDefaults = _NOTHING) -> SamplingParams:
    """As completion_params."""
    fields = _common(asked, defaults)
    most, newer = asked.max_tokens, asked.max_completion_tokens
    if most is not None and newer is not None and most != newer:
        raise invalid(
            f"max_tokens ({most}) and max_completion_tokens ({newer}) are two names of one thing: "
            "give one",
            "max_tokens",
        )
    fields["max_tokens"] = most if newer is None else newer
    top = asked.top_logprobs
    if top is not None and top > 0 and not asked.logprobs:
        raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
    if top is not None and not 0 <= top <= MAX_LOGPROBS:
        raise invalid(
            f"top_logprobs must be between 0 and {MAX_LOGPROBS}, not {top}", "top_logprobs"
        )
    fields["logprobs"] = (top or 0) if asked.logprobs else None
    return _checked(fields)


def _common(asked: CompletionRequest | ChatRequest, defaults: SamplingDefaults) -> dict[str, Any]:
    given = {name: value for name in _SAME if (value := getattr(asked, name)) is not None}
    fields = defaults.fields() | given
    for name in _TUPLES:
        value = getattr(asked, name)
        if value is not None:
            fields[name] = tuple(value)
    if fields.get("top_k") == -1:
        fields["top_k"] = 0
    stop = asked.stop
    if stop is not None:
        fields["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if asked.logit_bias:
        fields["logit_bias"] = _biases(asked.logit_bias)
    fields["grammar"] = grammar_of(asked)
    if asked.stream_options is not None and not asked.stream:
        raise invalid("stream_options needs stream to be true", "stream_options")
    if asked.prompt_logprobs is not None and asked.stream:
        raise invalid("prompt_logprobs are not streamed: set stream to false", "prompt_logprobs")
    return fields


def _biases(given: dict[str, float]) -> dict[int, float]:
    for key in given:
        if not re.fullmatch(TOKEN_ID_KEY, key):
            raise invalid(
                f"the keys of logit_bias are token ids, of 1 to 9 digits, not {key[:40]!r}",
                "logit_bias",
            )
    return {int(key): bias for key, bias in given.items()}


def _checked(fields: dict[str, Any]) -> SamplingParams:
    params = SamplingParams(**fields)
    try:
        params.validate()
    except ParameterError as error:
        raise _refusal(error) from None
    return params


def _refusal(error: ParameterError) -> HttpError:
    return invalid(str(error), error.param)
