"""Grammar masks on the CPU: what a mask does not have becomes -inf, after all other edits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..machine_code import native

Int32Array = npt.NDArray[np.int32]

_MINUS_INF = np.float32(-np.inf)
_INF = np.float32(np.inf)


@native()
def mask_rows(logits, rows, masks, masked, first):  # type: ignore[no-untyped-def]
    """Masks logits [R, width] float32 of a shard from token `first` on, in place.

    rows: [g] int32, of each of masks [g, words] int32; masked: [g] bool, whether it holds.
    NaN and +inf stay: the sampler is to see that the model's logits are broken.
    """
    for i in range(len(rows)):
        if not masked[i]:
            continue
        row = logits[rows[i]]
        mask = masks[i]
        for local in range(len(row)):
            token = first + local
            if not (mask[token >> 5] >> (token & 31)) & 1 and row[local] < _INF:
                row[local] = _MINUS_INF
