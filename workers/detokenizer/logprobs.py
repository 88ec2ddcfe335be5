"""From a result's logprob records to what the client is told."""

from __future__ import annotations

import numpy as np

from albireo.ipc.plan import MAX_TOP_LOGPROBS, Int32Array
from albireo.ipc.protocol import Logprobs, TokenLogprob
from albireo.workers.tokenizer.text_model import TextModel

_LOGPROB, _RANK, _HEAD = 2, 3, 4


class TokenTexts:
    """The bytes of tokens."""

    def __init__(self, text: TextModel) -> None:
        self._text = text

    def __getitem__(self, token: int) -> bytes:
        """Rows of the embedding beyond the tokenizer's vocabulary have none."""
        return self._text.bytes_of(token)


def read_logprobs(record: Int32Array, token: int, best: int, texts: TokenTexts) -> Logprobs:
    """Of one record (ipc/plan.py): of the token at its position, and of the `best` ones there."""
    values = record.view(np.float32)
    ids = record[_HEAD : _HEAD + best].tolist()
    scores = values[_HEAD + MAX_TOP_LOGPROBS : _HEAD + MAX_TOP_LOGPROBS + best].tolist()
    top = [
        TokenLogprob(other, score, place, texts[other])
        for place, (other, score) in enumerate(zip(ids, scores, strict=True), 1)
        if other >= 0  # no more had a finite logit
    ]
    itself = TokenLogprob(token, float(values[_LOGPROB]), int(record[_RANK]), texts[token])
    return Logprobs(itself, top)
