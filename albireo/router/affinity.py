"""Which prefixes a group is likely to have in its prefix cache, as far as the router can tell.

A prompt is cut into pieces of PIECE tokens, and each piece gets a name that
stands for all tokens up to its end and the request's cache_salt:

    root = hash(salt)      name i = hash(name i-1, tokens of piece i)

A group's names are kept least recently used first, and no more of them than its
KV blocks could hold, which is about what its cache forgets too.  A name that is
wrong (two prefixes of one hash, a block that was evicted) costs a prefill that
was hoped to be shorter, nothing else.
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from collections.abc import Sequence

PIECE = 64
"""Tokens: coarser than a KV block, to spend little on long prompts."""
MAX_PIECES = 1024
"""Of one prompt: what lies beyond is not looked at."""

_TOKEN_BYTES = 4

assert array("i").itemsize == _TOKEN_BYTES, sys.platform


def names_of(tokens: Sequence[int], salt: str, known: Sequence[int] = ()) -> list[int]:
    """Names of the whole pieces of `tokens`; known: the names of its first pieces."""
    names = list(known)
    count = min(len(tokens) // PIECE, MAX_PIECES)
    if len(names) >= count:
        return names
    begin = len(names) * PIECE
    data = array("i", tokens[begin : count * PIECE]).tobytes()
    name = names[-1] if names else hash(salt)
    size = PIECE * _TOKEN_BYTES
    for start in range(0, len(data), size):
        name = hash((name, data[start : start + size]))
        names.append(name)
    return names


class GroupPrefixes:
    """The names of one group, the one that was used least recently first.

    max_tokens: that its KV blocks hold.
    """

    def __init__(self, max_tokens: int) -> None:
        self._capacity = max_tokens // PIECE
        self.names: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self.names)

    def resize(self, max_tokens: int) -> None:
        """From now on its KV blocks hold so many."""
        self._capacity = max_tokens // PIECE

    def found(self, names: Sequence[int]) -> int:
        """Tokens at a prompt's beginning that the group is likely to have."""
        mine = self.names
        if not names or names[0] not in mine:
            return 0
        for place, name in enumerate(names):
            if name not in mine:
                return place * PIECE
        return len(names) * PIECE

    def add(self, names: Sequence[int]) -> None:
        """The group has computed these, or is going to."""
        mine = self.names
        # The first piece last, so that a prefix is forgotten from its end.
        for name in reversed(names):
            mine[name] = None
            mine.move_to_end(name)
        while len(mine) > self._capacity:
            mine.popitem(last=False)

    def clear(self) -> None:
        self.names.clear()
