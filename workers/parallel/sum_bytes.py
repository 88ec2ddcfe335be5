"""Bytes that ranks sum at once, for cuda.py and for who sizes steps without torch."""

SLAB_BYTES = 8 << 20
"""The most that one launch of our kernel (one_shot.py) and two_shot move: 1,024 rows of 4,096 in
bfloat16."""

PIECES_BYTES = 2 * SLAB_BYTES
"""Up to here our kernel sums in pieces, which the CPU launches in a fraction of the time that NCCL
takes it; 8 MiB take the GPU 40 us, and 47 by NCCL.  Graphs of mixed steps end here."""
