"""How large a mixed step is, and the sizes that graphs of them are captured for.

    rows      of chunks and decodes together, in few steps up to `most_rows`
    chunks    places for so many: one for each 16 rows, as few prompts are shorter
    decodes, logits    places for so many of each, the same number: one of 16, 64, 256, ...

Which graph a step gets follows from its plan alone, so all ranks take the same.

A graph saves the CPU's launches, and nothing where the GPU is slower than those.
There is none for such steps: padding would cost what the graph does not bring,
and each one costs time at start-up and memory.
"""

from __future__ import annotations

from typing import NamedTuple

from ....ipc.plan import PlanView
from ...parallel.sum_bytes import PIECES_BYTES

_ROWS = (64, 128, 256, 384, 512, 640, 768, 896, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
_SEQUENCES = (16, 64, 256, 1024)
_ROWS_A_CHUNK = 16
_LEAST_CHUNKS = 8

_LOADED = (1, 2, 4, *range(8, 512, 8), *range(512, 2048, 16), *range(2048, 8193, 128))
"""Rows, the further apart the more they are: kernels of more have larger tiles."""

_LAUNCH_S, _LAUNCH_OF_RANKS_S = 700e-6, 1000e-6
"""To launch a layer's kernels one by one where that is slow: a step of Qwen3-8B took 350 us a layer
beside an H200, 400 to 780 beside five H100; and 0.7 to 1.4 ms where two ranks sum by NCCL, one of
Qwen3-0.6B beside two H100."""
_BESIDE_DECODES_S = 350e-6
"""Of a layer in a step that decodes wait for."""
_FLOP_PER_S = 600e12
"""Of an H100's matrix products in a prefill."""


class MixedSize(NamedTuple):
    """Of a mixed step, or what it is padded to.

    rows: of all sequences.  chunks, decodes: sequences, in this order.  logits: rows
    that sample, then those that are scored.
    """

    rows: int
    chunks: int
    decodes: int
    logits: int

    def holds(self, step: MixedSize) -> bool:
        """Whether a step of this size can be padded to mine."""
        return all(mine >= its for mine, its in zip(self, step, strict=True))


def size_of(plan: PlanView, sampled: int) -> MixedSize:
    """As it is; sampled: its sampling rows."""
    decodes = len(plan.decode)
    return MixedSize(
        len(plan.chunk_token) + decodes, len(plan.chunk), decodes, sampled + len(plan.score)
    )


def most_rows(layer_products: int, tp: int, max_num_batched_tokens: int, row_bytes: int) -> int:
    """Rows of the largest size: beyond, a step takes the GPU longer than launching it the CPU.

    layer_products: multiplications for a token in a layer, those of all ranks.  row_bytes: of what
    several ranks sum (sum_bytes.py).
    """
    bound = _rows_in(_LAUNCH_S if tp == 1 else _LAUNCH_OF_RANKS_S, layer_products, tp)
    if tp > 1:
        bound = min(bound, PIECES_BYTES / row_bytes)
    return min(_largest(bound), max_num_batched_tokens)


def rows_beside_decodes(layer_products: int, tp: int) -> int:
    """Of a step that decodes can wait for; 2,048 at most."""
    return _largest(min(_rows_in(_BESIDE_DECODES_S, layer_products, tp), 2048))


def _rows_in(seconds: float, layer_products: int, tp: int) -> float:
    """That the GPU computes in a layer in so long."""
    return seconds * _FLOP_PER_S * tp / (2 * layer_products)


def _largest(bound: float) -> int:
    """Of the sizes up to the bound; the smallest where there is none."""
    return max((each for each in _ROWS if each <= bound), default=_ROWS[0])


def loaded_rows(max_num_batched_tokens: int) -> list[int]:
    """Numbers of rows whose kernels are loaded before the first request, in ascending order.

    cuBLAS has kernels for tiles of 8, 16, 24, ... rows, and loads one when it is first wanted, for
    which the GPU has to come to rest; others are compiled.
    """
    return _up_to(max_num_batched_tokens, _LOADED)


def captured_mixed_sizes(rows: int, max_num_seqs: int) -> list[MixedSize]:
    """Up to so many rows, in ascending order: the first that holds a step wastes least."""
    return [
        MixedSize(each, min(max(each // _ROWS_A_CHUNK, _LEAST_CHUNKS), max_num_seqs), count, count)
        for each in _up_to(rows, _ROWS)
        for count in _up_to(min(each, max_num_seqs), _SEQUENCES)
    ]


def _up_to(most: int, sizes: tuple[int, ...]) -> list[int]:
    return [size for size in sizes if size < most] + [most]
