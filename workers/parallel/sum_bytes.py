"""Bytes that ranks sum at once, for cuda.py and for who sizes steps without torch."""

SLAB_BYTES = 8 << 20
"""The most that one launch of our kernel (one_shot.py) and two_shot move: 1,024 rows of 4,096 in
bfloat16."""

PIECES_BYTES = 2 * SLAB_BYTES
"""Up to here our kernel sums in pieces where it is the fastest at 8 MiB (two ranks: 40 us, NCCL
47 and the CPU many times as long to launch); elsewhere NCCL.  Graphs of mixed steps end here."""
