"""What the filter kernels of a step tell each other about a row: columns of three tables.

    floats [rows, FLOATS]   int32 ints [rows, INTS]   int64 longs [rows, LONGS]

`bound` writes all but MASS_ABOVE, MASS_BEFORE and the buckets of WIDE rows,
which `select` finds; `finish` writes THRESHOLD.
"""

from __future__ import annotations

import triton.language as tl

# floats
BEST = tl.constexpr(0)
LOW = tl.constexpr(1)
"""Tokens below are no boundary of a filter."""
SCALE = tl.constexpr(2)
"""Buckets for each unit of logit below BEST."""
FLOOR = tl.constexpr(3)
"""Tiles whose maximum is below have neither mass nor a boundary."""
THRESHOLD = tl.constexpr(4)
FLOATS = tl.constexpr(8)

# ints
MODE = tl.constexpr(0)
COUNT = tl.constexpr(1)
"""Candidates that `collect` found; may exceed the room for them."""
NEEDED = tl.constexpr(2)
"""top-k: tokens to keep among those of BUCKET_K; 0 where top-k is off."""
BUCKET_K = tl.constexpr(3)
BUCKET_P_FIRST = tl.constexpr(4)
BUCKET_P_LAST = tl.constexpr(5)
ABOVE = tl.constexpr(6)
"""top-k: tokens of the buckets before BUCKET_K."""
WEIGHS = tl.constexpr(7)
"""Whether masses are asked for: there is top-p."""
INTS = tl.constexpr(8)

# longs
MASS_ABOVE = tl.constexpr(0)
"""Of the buckets before BUCKET_K; without top-k, of the whole row."""
MASS_BEFORE = tl.constexpr(1)
"""Of the buckets before BUCKET_P_FIRST."""
MASS_REST = tl.constexpr(2)
"""Of the tokens below LOW, which are in no bucket."""
LONGS = tl.constexpr(4)

# MODE
OPEN = tl.constexpr(0)
"""Neither top-k nor top-p, greedy, or not finite."""
NARROW = tl.constexpr(1)
"""All tokens from LOW on are candidates."""
WIDE = tl.constexpr(2)
"""Candidates are the tokens of the buckets in which the boundaries lie."""
EXHAUSTIVE = tl.constexpr(3)
"""The whole row is searched: its boundary lies outside the buckets."""
