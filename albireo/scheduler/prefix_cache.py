"""The prefix cache: which blocks hold which tokens, by the hash of all tokens up to their end.

    root = H(salt)      name of block i = H(name of block i-1, tokens of block i)

A name stands for a whole prefix, so equal names mean equal keys and values.
Only full blocks have one, and a block with a name is never written again.  H
is BLAKE2b with 128 bits: prompts come from strangers, and a collision would
show one of them another's context.

Which blocks nobody uses, and so may be given away, is the pool's business
(blocks.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

from albireo.ipc.plan import Int32Array

_NAME_BYTES = 16
_TOKEN_BYTES = 4


def root_name(salt: str) -> bytes:
    """What the chain of a sequence starts from."""
    return blake2b(salt.encode(), digest_size=_NAME_BYTES).digest()


def next_name(name: bytes, tokens: bytes) -> bytes:
    """The name of the block after `name`; tokens: its ids, int32 in memory order."""
    return blake2b(name + tokens, digest_size=_NAME_BYTES).digest()


def extend_names(names: list[bytes], tokens: Int32Array, block_size: int) -> None:
    """Adds the names of the full blocks of `tokens` that `names` lacks.

    names[0] is the root, names[i + 1] belongs to block i.
    """
    if len(tokens) < len(names) * block_size:
        return
    data = tokens.tobytes()
    width = block_size * _TOKEN_BYTES
    name = names[-1]
    for at in range((len(names) - 1) * width, len(data) - width + 1, width):
        name = blake2b(name + data[at : at + width], digest_size=_NAME_BYTES).digest()
        names.append(name)


class PrefixCache:
    """Names of blocks, and the block of each name."""

    def __init__(self, num_blocks: int) -> None:
        self._block_of: dict[bytes, int] = {}
        self._name_of: list[bytes | None] = [None] * num_blocks

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, block: int) -> bool:
        return self._name_of[block] is not None

    def blocks(self, names: list[bytes]) -> list[int]:
        """The blocks of the longest prefix that is here; names: with the root in front."""
        found = []
        block_of = self._block_of
        for at in range(1, len(names)):
            block = block_of.get(names[at])
            if block is None:
                break
            found.append(block)
        return found

    def add(self, names: Iterable[tuple[bytes, int]]) -> None:
        """Names full blocks; where another one has that name, a block stays nameless."""
        block_of, name_of = self._block_of, self._name_of
        for name, block in names:
            if block_of.setdefault(name, block) == block:
                name_of[block] = name

    def named(self, blocks: list[int]) -> tuple[list[int], list[int]]:
        """Those of the blocks that have a name, and the others, each in their order."""
        name_of = self._name_of
        named = [block for block in blocks if name_of[block] is not None]
        if len(named) == len(blocks):
            return named, []
        return named, [block for block in blocks if name_of[block] is None]

    def drop(self, blocks: list[int]) -> None:
        """Takes their names from blocks."""
        block_of, name_of = self._block_of, self._name_of
        for block in blocks:
            name = name_of[block]
            if name is not None:
                name_of[block] = None
                del block_of[name]
