"""How large new tokens are in a message, roughly: cheap enough to be asked of each piece."""

from __future__ import annotations

from .messages import Piece
from .protocol import Delta

PIECE_BYTES, TOKEN_BYTES, LOGPROB_BYTES = 32, 4, 24


def rough_bytes(item: Delta | Piece) -> int:
    """Of one request's new tokens, with their text and logprobs."""
    size = PIECE_BYTES + TOKEN_BYTES * len(item.token_ids) + len(item.text)
    for scored in (item.logprobs, item.prompt_logprobs):
        if scored:
            size += len(scored) * LOGPROB_BYTES * (1 + len(scored[0].top))
    return size
