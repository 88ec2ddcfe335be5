"""Types of parameters with their ranges, as the OpenAPI document gives them.

The ranges are those of ipc/params.py, which checks them: here they are said, so
that a generated client, or a fuzzer, knows them beforehand.  Checked here is what
would not even reach it: integers that no message to the node can carry.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from albireo.ipc.params import (
    MAX_ALLOWED_TOKENS,
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS,
    MAX_BIASED_TOKENS,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOKEN_ID,
    PRIORITIES,
)

_MOST = 2**63 - 1


def _said(**schema: Any) -> msgspec.Meta:
    return msgspec.Meta(extra_json_schema=schema)


def _counted(least: int) -> msgspec.Meta:
    return msgspec.Meta(le=_MOST, extra_json_schema={"minimum": least})


MaxTokens = Annotated[int, _counted(1)]
MaxTokensOrNone = Annotated[int, _counted(0)]
"""0 with echo alone: the prompt's log-probabilities."""
MinTokens = Annotated[int, _counted(0)]
Choices = Annotated[int, _said(minimum=1, maximum=MAX_CHOICES)]
Temperature = Annotated[float, _said(minimum=0, maximum=100)]
TopK = Annotated[int, _said(minimum=-1, maximum=MAX_TOKEN_ID)]
TopP = Annotated[float, _said(exclusiveMinimum=0, maximum=1)]
MinP = Annotated[float, _said(minimum=0, maximum=1)]
Repetition = Annotated[float, _said(minimum=1e-6, maximum=100)]
Penalty = Annotated[float, _said(minimum=-2, maximum=2)]
Seed = Annotated[int, _said(minimum=-(2**63), maximum=2**64 - 1)]
NumLogprobs = Annotated[int, _said(minimum=0, maximum=MAX_LOGPROBS)]
Priority = Annotated[int, msgspec.Meta(ge=PRIORITIES[0], le=PRIORITIES[1])]

TokenId = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKEN_ID)]
PromptText = Annotated[str, _said(minLength=1)]
PromptTokens = Annotated[list[TokenId], _said(minItems=1)]
Prompts = PromptText | Annotated[list[PromptText | TokenId | PromptTokens], _said(minItems=1)]
AtLeastOne = _said(minItems=1)
StopTokens = Annotated[list[TokenId], _said(maxItems=MAX_STOP_TOKEN_IDS)]
AllowedTokens = Annotated[list[TokenId], _said(minItems=1, maxItems=MAX_ALLOWED_TOKENS)]
TOKEN_ID_KEY = "[0-9]{1,9}"
Biases = Annotated[
    dict[str, Annotated[float, _said(minimum=-100, maximum=100)]],
    _said(maxProperties=MAX_BIASED_TOKENS, propertyNames={"pattern": f"^{TOKEN_ID_KEY}$"}),
]

_StopString = Annotated[str, _said(minLength=1, maxLength=MAX_STOP_STRING_CHARS)]
StopStrings = _StopString | Annotated[list[_StopString], _said(maxItems=MAX_STOP_STRINGS)]
_BadWord = Annotated[str, _said(minLength=1, maxLength=MAX_BAD_WORD_CHARS)]
BadWords = Annotated[list[_BadWord], _said(maxItems=MAX_BAD_WORDS)]
