"""What the sampling kernels compute with: random words, Gumbel noise, mass, order, addresses.

Decisions are made in float64 and integers, by the expressions of the CPU
sampler (sampling/draw.py, sampling/filters.py).  They can differ from the CPU's
only in the last bit of a float64 logarithm, or of a mass (2**-42): a token then
differs where two scores are that close, about once in 1e13 draws.  Float32
appears only where it preselects, by bounds with a margin: see gumbel_bound and draw.py.

Logits are rows of `segments` pieces of `width` tokens each (one a rank), piece
s of row r at s * segment_stride + r * row_stride; tiles of TILE tokens never
cross a piece.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = 512
"""Tokens that share one maximum, and are skipped together."""

LINE = 128
"""Tokens that a warp loads at once, where it has a tile to itself."""

LOWEST_FINITE = tl.constexpr(-3.4028234663852886e38)
NEGLIGIBLE = tl.constexpr(-30.0)
MASS_BITS = tl.constexpr(42)
KEY_BITS = tl.constexpr(32)

_DOMAIN = tl.constexpr(0x53414D50)
_M0 = tl.constexpr(0xD2511F53)
_M1 = tl.constexpr(0xCD9E8D57)
_WORD_BITS = tl.constexpr(32)
_LN2 = tl.constexpr(0.6931471805599453)
_W0 = tl.constexpr(0x9E3779B9)
_W1 = tl.constexpr(0xBB67AE85)
_WORD = tl.constexpr(2.0**-32)


@triton.jit
def philox(block, position, seed):
    """Four uint32 words for each of `block` (token id // 4); seed: int64, position: int32."""
    c0 = block.to(tl.uint32)
    c1 = position.to(tl.uint32)
    c2 = tl.full([], 0, tl.uint32)
    c3 = tl.full([], _DOMAIN, tl.uint32)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        # One instruction gives both halves of a product.
        product0 = c0.to(tl.uint64) * _M0
        product1 = c2.to(tl.uint64) * _M1
        c0 = (product1 >> _WORD_BITS).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> _WORD_BITS).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 = k0 + _W0
        k1 = k1 + _W1
    return c0, c1, c2, c3


@triton.jit
def token_word(token, position, seed):
    """The word of each token id of a block, each computed on its own."""
    w0, w1, w2, w3 = philox(token // 4, position, seed)
    lane = token % 4
    return tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))


@triton.jit
def tile_words(first_token, position, seed, TILE: tl.constexpr, GROUPED: tl.constexpr):
    """The words of tokens first_token .. first_token + TILE - 1.

    GROUPED: first_token is a multiple of 4, so that four tokens share a block.
    """
    if GROUPED:
        w0, w1, w2, w3 = philox(first_token // 4 + tl.arange(0, TILE // 4), position, seed)
        return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    else:
        return token_word(first_token + tl.arange(0, TILE), position, seed)


@triton.jit
def gumbel_bound(word):
    """At least -log(-log u), u = (word + 0.5) / 2**32, in float32 without a logarithm.

    With x = 1 - u, -log u is x + x**2 / 2 + ..., of which two terms remain: so it is hardly
    more where x is small, which is where a token wins.  And the bits of a float32, as a
    whole number, are 2**23 (its log2 + 127) or up to 0.0861 of 2**23 less (Mitchell, 1962).
    Roundings may take 2e-5 off the bound.
    """
    c = (word ^ 0xFFFFFFFF).to(tl.float32)
    q = (c * 2.0**-65 + 2.0**-32) * c + 2.0**-33
    return 127 * _LN2 - q.to(tl.int32, bitcast=True).to(tl.float32) * (_LN2 * 2.0**-23)


@triton.jit
def bounded_inverse(temperature):
    """1 / temperature in float32, finite for the smallest temperature too."""
    return tl.minimum(1.0 / temperature, 3e38)


@triton.jit
def every_fourth(lines):
    """Lines [m, LINE] as four [m, LINE / 4]: columns 0, 4, ..., then 1, 5, ... and so on."""
    even, odd = tl.split(tl.reshape(lines, [lines.shape[0], lines.shape[1] // 4, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def best_of_tiles(lines, TILES: tl.constexpr):
    """[TILES] maxima of tiles in lines [m, n]: line i is the i // TILES-th of tile i % TILES.

    So every warp has tiles of its own, and most of the work is within threads.
    """
    tiles = tl.reshape(lines, [lines.shape[0] // TILES, TILES, lines.shape[1]])
    return tl.max(tl.max(tiles, 0), 1)


@triton.jit
def score_bounds(
    z0, z1, z2, z3, first_token, frame, inverse, position, seed,
    TILES: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """[TILES]: at least the best (z - frame) / temperature + noise of each tile.

    z0, ...: every_fourth of [m, LINE], in lines as best_of_tiles has them.  first_token:
    int32 [m], where the lines begin.  frame: [m], of the lines' tiles, finite.
    GROUPED: see tile_words.
    """
    column = tl.arange(0, z0.shape[1])[None, :]
    if GROUPED:
        w0, w1, w2, w3 = philox((first_token // 4)[:, None] + column, position, seed)
    else:
        token = first_token[:, None] + column * 4
        w0 = token_word(token, position, seed)
        w1 = token_word(token + 1, position, seed)
        w2 = token_word(token + 2, position, seed)
        w3 = token_word(token + 3, position, seed)
    frame = frame[:, None]
    low = tl.maximum(
        (z0 - frame) * inverse + gumbel_bound(w0), (z1 - frame) * inverse + gumbel_bound(w1)
    )
    high = tl.maximum(
        (z2 - frame) * inverse + gumbel_bound(w2), (z3 - frame) * inverse + gumbel_bound(w3)
    )
    return best_of_tiles(tl.maximum(low, high), TILES)


@triton.jit
def exact_gumbel(word):
    """-log(-log u) in float64, as the CPU sampler computes it."""
    return -tl.log(-tl.log((word.to(tl.float64) + 0.5) * _WORD))


@triton.jit
def token_mass(scaled):
    """exp(scaled) in units of 2**-MASS_BITS, rounded down; float64 in [NEGLIGIBLE, 0] -> int64."""
    doublings = (scaled * 1.4426950408889634 - 0.5).to(tl.int64)
    turns = doublings.to(tl.float64)
    r = scaled - turns * 6.93147180369123816490e-01 - turns * 1.90821492927058770002e-10
    e = r * (1.0 / 479001600.0) + 1.0 / 39916800.0
    e = e * r + 1.0 / 3628800.0
    e = e * r + 1.0 / 362880.0
    e = e * r + 1.0 / 40320.0
    e = e * r + 1.0 / 5040.0
    e = e * r + 1.0 / 720.0
    e = e * r + 1.0 / 120.0
    e = e * r + 1.0 / 24.0
    e = e * r + 1.0 / 6.0
    e = e * r + 0.5
    e = e * r + 1.0
    e = e * r + 1.0
    return (e * 1152921504606846976.0).to(tl.int64) >> (60 - MASS_BITS - doublings)


@triton.jit
def logit_mass(z, best, inverse):
    """Mass of logits z (float32) of a row; 0 for those below NEGLIGIBLE.  inverse: float64."""
    scaled = (z.to(tl.float64) - best.to(tl.float64)) * inverse
    counts = scaled >= NEGLIGIBLE
    return tl.where(counts, token_mass(tl.where(counts, scaled, 0.0)), 0)


@triton.jit
def order(z):
    """Float32 (no NaN) -> int64 in 0 .. 2**32 - 1 of the same order; both zeros are one."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    signed = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return signed.to(tl.int64) + 2147483648


@triton.jit
def from_order(key):
    """The inverse of `order`, for one key."""
    signed = (key - 2147483648).to(tl.int32)
    bits = signed ^ ((signed >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def not_below(threshold):
    """The lowest float32 >= threshold (float64): float32 logits compare with it as with that."""
    rounded = threshold.to(tl.float32)
    return tl.where(rounded.to(tl.float64) < threshold, from_order(order(rounded) + 1), rounded)


@triton.jit
def max_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def bucket_of(z, best, scale, BUCKETS: tl.constexpr):
    """Bucket of logits of a row; grows as z falls.  The last one has no lower end."""
    return tl.minimum((best - z) * scale, BUCKETS - 1.0).to(tl.int32)


@triton.jit
def is_filtered(slot, temperatures, top_ks, top_ps, min_ps):
    """Whether a slot draws, with top-k, top-p or min-p."""
    by_k = tl.load(top_ks + slot) > 0
    by_mass = (tl.load(top_ps + slot) < 1.0) | (tl.load(min_ps + slot) > 0.0)
    return (by_k | by_mass) & (tl.load(temperatures + slot) > 0.0)


@triton.jit
def step_row(which, row, LISTED: tl.constexpr):
    """The row of the step, which has slot and position, that row `row` of the logits is.

    LISTED: which [rows] int32 says it, -1 where there is none; the logits are then not read.
    """
    if LISTED:
        return tl.maximum(tl.load(which + row), 0)
    else:
        return row


@triton.jit
def load_tile(logits, row, tile, width, row_stride, segment_stride, TILE: tl.constexpr):
    """(float32 [TILE] logits of a tile, -inf outside; the tile's first token in its row)."""
    tiles_per_segment = tl.cdiv(width, TILE)
    segment = tile // tiles_per_segment
    start = (tile % tiles_per_segment) * TILE
    lane = start + tl.arange(0, TILE)
    address = logits + segment.to(tl.int64) * segment_stride + row.to(tl.int64) * row_stride
    z = tl.load(address + lane, mask=lane < width, other=-float("inf"))
    return z.to(tl.float32), segment * width + start
