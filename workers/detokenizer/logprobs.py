"""From a result's logprob records to what the client is told."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from albireo.ipc.plan import MAX_TOP_LOGPROBS, Int32Array
from albireo.ipc.protocol import Logprobs, TokenLogprob

_LOGPROB, _RANK, _HEAD = 2, 3, 4


BytesOf = Callable[[int], bytes]
"""A token's own bytes: TextModel.bytes_of."""


def read_logprobs(record: Int32Array, token: int, best: int, bytes_of: BytesOf) -> Logprobs:
    """Of one record (ipc/plan.py): of the token at its position, and of the `best` ones there."""
    values = record.view(np.float32)
    ids = record[_HEAD : _HEAD + best].tolist()
    scores = values[_HEAD + MAX_TOP_LOGPROBS : _HEAD + MAX_TOP_LOGPROBS + best].tolist()
    top = [
        TokenLogprob(other, score, place, bytes_of(other))
        for place, (other, score) in enumerate(zip(ids, scores, strict=True), 1)
        if other >= 0  # no more had a finite logit
    ]
    itself = TokenLogprob(token, float(values[_LOGPROB]), int(record[_RANK]), bytes_of(token))
    return Logprobs(itself, top)
