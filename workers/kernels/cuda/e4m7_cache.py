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
small, and by the largest's power of two.  For decodes (e4m7_decode.cu) queries, weights and sums
make up for it, by powers of two, so that 9 instructions unpack 8 numbers, and none computes with
them one by one.  Below 2^-126 a number is zero; one that is infinite, or none, makes so what comes
of its token's key, or value.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .e4m7 import TOO_SMALL

ENLARGED = tl.constexpr(2.0**TOO_SMALL)


_HALVES = tl.constexpr("""{
    .reg .b32 high, more;
    and.b32 high, $6, 0x87878787;
    prmt.b32 $0, $4, high, 0x5140;
    prmt.b32 $1, $4, high, 0x7362;
    shl.b32 high, $6, 4;
    and.b32 high, high, 0x80808080;
    shr.u32 more, $6, 4;
    lop3.b32 high, more, 0x07070707, high, 0xEA;
    prmt.b32 $2, $5, high, 0x5140;
    prmt.b32 $3, $5, high, 0x7362;
}""")
"""PTX: of four low bytes of each half, and the high ones of both, two registers of two numbers
of each."""


@triton.jit
def load_narrow(
    cache, block, row, VALUES: tl.constexpr,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Keys or values of a block: low bytes of both halves, and high ones.

    row: kv_head * BLOCK_SIZE + a token's place there, [n].
    """
    ALL: tl.constexpr = KV_HEADS * BLOCK_SIZE * HEAD_DIM
    HALF: tl.constexpr = HEAD_DIM // 2
    PLACE: tl.constexpr = ALL * 3 // 2 if VALUES else 0
    at = cache + block.to(tl.int64) * (3 * ALL + KV_HEADS * BLOCK_SIZE * 4) + PLACE
    i = tl.arange(0, HALF)
    low = at + row[:, None] * HEAD_DIM + i[None, :]
    high = at + ALL + row[:, None] * HALF + i[None, :]
    return tl.load(low), tl.load(low + HALF), tl.load(high)


@triton.jit
def load_narrow_powers(
    cache, block, row,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """As load_narrow: of a token's key and value in one int32."""
    PLACE: tl.constexpr = KV_HEADS * BLOCK_SIZE * HEAD_DIM * 3
    at = cache + block.to(tl.int64) * (PLACE + KV_HEADS * BLOCK_SIZE * 4) + PLACE
    return tl.load(at.to(tl.pointer_type(tl.int32)) + row)


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
