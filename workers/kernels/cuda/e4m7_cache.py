"""A KV cache in 12 bits a number: bfloat16's sign and mantissa, and an exponent of four bits.

The format is that of weights in 12 bits (e4m7.py), with one largest exponent for each token's
key or value of a head: what is above 2^-14 of its largest number is exact, smaller ones are so
to half of 2^-21 of it.  A number's four bits of exponent stand where bfloat16 has the last four
of its eight, so its low byte is stored as it is, and of its high byte sign and three bits:

    [kv_heads][block_size][head_dim]      low bytes: exponent's last bit, mantissa
    [kv_heads][block_size][head_dim / 2]  of i and j = i + head_dim / 2: sign of i (bit 7), exponent
                                          of j (6 to 4), sign of j (3), exponent of i (2 to 0)
    both again, for values
    [kv_heads][block_size][2]             the power of two of the largest key, and value, bfloat16

is a block, of 3 head_dim + 4 bytes for each token and head.  What is unpacked is 2^112 times too
small, and by the largest's power of two.  Queries, weights and sums make up for it, by powers of
two, so that 9 instructions unpack 8 numbers, and none computes with them one by one.  Below 2^-126
a number is zero; one that is infinite, or none, makes so what comes of its token's key, or value.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .e4m7 import TOO_SMALL

ENLARGED = tl.constexpr(2.0**TOO_SMALL)
QUERY_FACTOR = tl.constexpr(2.0**64)
"""Keys' numbers are near the smallest there are: with it products are not."""
SCORE_FACTOR = tl.constexpr(2.0 ** (TOO_SMALL - 64))
WEIGHT_FACTOR = tl.constexpr(2.0**48)
"""As QUERY_FACTOR, for values."""
SUM_FACTOR = tl.constexpr(2.0 ** (TOO_SMALL - 48))


def _unpacking(one: str, other: str) -> str:
    """PTX: of four low bytes of each half, and the high ones of both, two registers of two numbers
    of each.  one, other: which bytes these are of, as prmt has them; the high ones are 4 to 7."""
    return f"""{{
        .reg .b32 high, more;
        and.b32 high, $6, 0x87878787;
        prmt.b32 $0, $4, high, {one};
        prmt.b32 $1, $4, high, {other};
        shl.b32 high, $6, 4;
        and.b32 high, high, 0x80808080;
        shr.u32 more, $6, 4;
        lop3.b32 high, more, 0x07070707, high, 0xEA;
        prmt.b32 $2, $5, high, {one};
        prmt.b32 $3, $5, high, {other};
    }}"""


_HALVES = tl.constexpr(_unpacking("0x5140", "0x7362"))
"""Of four numbers side by side."""
_PAIRS = tl.constexpr(_unpacking("0x6240", "0x7351"))
"""Of two tokens' pairs of columns: the even ones, and the odd ones."""


@triton.jit
def load_narrow(
    cache, block, row, mask, VALUES: tl.constexpr, PAIRS: tl.constexpr,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Keys or values, as bytes or as pairs of them: low ones of both halves, and high ones.

    block: of each token, [n].  row: kv_head * BLOCK_SIZE + its place there, [n].
    """
    TOGETHER: tl.constexpr = 2 if PAIRS else 1
    ALL: tl.constexpr = KV_HEADS * BLOCK_SIZE * HEAD_DIM // TOGETHER
    HALF: tl.constexpr = HEAD_DIM // TOGETHER // 2
    PLACE: tl.constexpr = KV_HEADS * BLOCK_SIZE * HEAD_DIM * 3 // 2 // TOGETHER if VALUES else 0
    STRIDE: tl.constexpr = KV_HEADS * BLOCK_SIZE * (3 * HEAD_DIM + 4) // TOGETHER
    if PAIRS:
        cache = cache.to(tl.pointer_type(tl.int16))
    i = tl.arange(0, HALF)
    at = cache + PLACE + block.to(tl.int64) * STRIDE
    low = at[:, None] + row[:, None] * (2 * HALF) + i[None, :]
    high = at[:, None] + ALL + row[:, None] * HALF + i[None, :]
    return (
        tl.load(low, mask=mask[:, None], other=0),
        tl.load(low + HALF, mask=mask[:, None], other=0),
        tl.load(high, mask=mask[:, None], other=0),
    )


@triton.jit
def load_narrow_powers(
    cache, block, row, mask,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """As load_narrow: of a token's key and value in one int32."""
    PLACE: tl.constexpr = KV_HEADS * BLOCK_SIZE * HEAD_DIM * 3
    at = cache + block.to(tl.int64) * (PLACE + KV_HEADS * BLOCK_SIZE * 4) + PLACE
    return tl.load(at.to(tl.pointer_type(tl.int32)) + row, mask=mask, other=0)


@triton.jit
def power_of_key(powers):
    """float32, of int32 as in memory."""
    return (powers << 16).to(tl.float32, bitcast=True)


@triton.jit
def power_of_value(powers):
    """See power_of_key."""
    return (powers & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _number(low, high):
    """bfloat16 of two bytes, int16."""
    return (low | high << 8).to(tl.bfloat16, bitcast=True)


@triton.jit
def _highs(both):
    """The high bytes of the first half's numbers and the second's, int16."""
    return both & 0x87, both >> 4 & 0x07 | both << 4 & 0x80


@triton.jit
def unpack_halves(first, second, high, ASSEMBLY: tl.constexpr):
    """uint8 tiles, the low bytes of both halves and the high ones -> bfloat16, both halves."""
    if ASSEMBLY:
        halves = tl.inline_asm_elementwise(
            _HALVES, "=&r,=&r,=&r,=&r,r,r,r", [first, second, high],
            dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        a, b = _highs(high.to(tl.int16))
        halves = _number(first.to(tl.int16), a), _number(second.to(tl.int16), b)
    return halves


@triton.jit
def unpack_pairs(first, second, high, ASSEMBLY: tl.constexpr):
    """As unpack_halves, in int16 tiles of two columns each -> even and odd columns of the first
    half, then of the second."""
    if ASSEMBLY:
        quarters = tl.inline_asm_elementwise(
            _PAIRS, "=&r,=&r,=&r,=&r,r,r,r", [first, second, high],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        a, b = _highs(high & 0xFF)
        c, d = _highs(high >> 8 & 0xFF)
        quarters = (
            _number(first & 0xFF, a), _number(first >> 8 & 0xFF, c),
            _number(second & 0xFF, b), _number(second >> 8 & 0xFF, d),
        )  # fmt: skip
    return quarters


@triton.jit
def widened(number, power):
    """What is unpacked, as bfloat16 of its own size."""
    return (number.to(tl.float32) * ENLARGED * power).to(tl.bfloat16)


@triton.jit
def _four_bits(bits, top):
    """bfloat16's bits, int32, with an exponent of four bits: 15 for numbers of exponent `top`."""
    exponent = (bits >> 7 & 255) - top + 15
    mantissa = bits & 127
    # Below: as many bits of the mantissa as are left, rounded. What rounds up to 128 has one more.
    lost = tl.minimum(1 - exponent, 9)
    rest = mantissa + 128 + (1 << lost - 1) >> lost
    number = tl.where(exponent > 0, exponent << 7 | mantissa, rest)
    return tl.where(bits & 0x7F80 == 0, 0, number), bits >> 15 & 1


@triton.jit
def store(
    cache, block, row, is_value, i, low, high, mask,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Keys and values: both halves of a token's heads, float32 [n, HALF], as if in bfloat16.

    block: int64, of the token.  row: kv_head * BLOCK_SIZE + its place there, [n].
    """
    ALL: tl.constexpr = KV_HEADS * BLOCK_SIZE * HALF
    a = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
    b = high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
    top = tl.maximum(tl.max(a >> 7 & 255, 1), tl.max(b >> 7 & 255, 1))
    a, sign_a = _four_bits(a, top[:, None])
    b, sign_b = _four_bits(b, top[:, None])
    both = sign_a << 7 | (b >> 8) << 4 | sign_b << 3 | a >> 8
    at = cache + block * (6 * ALL + KV_HEADS * BLOCK_SIZE * 4)
    part = at + tl.where(is_value, 3 * ALL, 0)
    place = (part + row * (2 * HALF))[:, None] + i[None, :]
    tl.store(place, a.to(tl.uint8), mask=mask[:, None])
    tl.store(place + HALF, b.to(tl.uint8), mask=mask[:, None])
    place = (part + 2 * ALL + row * HALF)[:, None] + i[None, :]
    tl.store(place, both.to(tl.uint8), mask=mask[:, None])
    powers = (at + 6 * ALL).to(tl.pointer_type(tl.int16)) + 2 * row + is_value
    tl.store(powers, (top << 7).to(tl.int16), mask=mask)
