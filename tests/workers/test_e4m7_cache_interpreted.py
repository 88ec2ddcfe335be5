"""A KV cache in 12 bits: what is stored is what is read, to the last bit that there is room for."""

from __future__ import annotations

import re
from operator import and_, lshift, rshift

import pytest
import torch

from .interpreted import use_interpreter

use_interpreter()

from albireo.workers.kernels.cuda import e4m7_cache, paging  # noqa: E402
from albireo.workers.kernels.cuda.rope import rope_and_cache  # noqa: E402

from .cuda_kernel_checks import rope_table  # noqa: E402
from .paged import PagedSequences  # noqa: E402

HEAD_DIM, KV_HEADS, BLOCK_SIZE = 64, 2, 16
TOKENS = 20


def unpacked(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, float64 [num_blocks, kv_heads, block_size, head_dim], as documented."""
    blocks, half = len(cache), HEAD_DIM // 2
    memory = cache.reshape(blocks, -1)
    sizes = [KV_HEADS * BLOCK_SIZE * each for each in (HEAD_DIM, half, HEAD_DIM, half, 4)]
    key, key_high, value, value_high, powers = memory.split(sizes, 1)
    powers = powers.contiguous().view(torch.bfloat16).view(blocks, KV_HEADS, BLOCK_SIZE, 2)
    found = []
    for which, low, high in ((0, key, key_high), (1, value, value_high)):
        low = low.reshape(blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM).int()
        high = high.reshape(blocks, KV_HEADS, BLOCK_SIZE, half).int()
        sign = torch.cat([high >> 7, high >> 3 & 1], -1)
        exponent = torch.cat([high & 7, high >> 4 & 7], -1) << 1 | low >> 7
        mantissa = low & 127
        number = torch.where(
            exponent > 0,
            torch.ldexp(1 + mantissa.double() / 128, exponent - 15),
            torch.ldexp(mantissa.double() / 128, exponent - 14),
        )
        found.append(number * (1 - 2 * sign) * powers[..., which, None].double())
    return found[0], found[1]


def stored(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[TOKENS, KV_HEADS, HEAD_DIM] in bfloat16 each, through the cache: float64."""
    paged = PagedSequences([TOKENS], BLOCK_SIZE, 0)
    kv = paging.new_kv_layer(
        paged.num_blocks,
        BLOCK_SIZE,
        KV_HEADS,
        HEAD_DIM,
        torch.bfloat16,
        lambda shape, dtype: torch.zeros(shape, dtype=dtype),
        e4m7=True,
    )
    kv.keys.fill_(255)
    batch = paged.batch([(0, 0, TOKENS)])
    batch.positions.zero_()  # No key is turned.
    qkv = torch.cat([torch.zeros(TOKENS, 1, HEAD_DIM).bfloat16(), key, value], 1).flatten(1)
    rope = rope_table(HEAD_DIM, 1)
    rope_and_cache(qkv, 1, KV_HEADS, HEAD_DIM, None, None, 0.0, rope, batch, kv)
    places = batch.kv_index.long()
    keys, values = unpacked(kv.keys)
    at = places // BLOCK_SIZE, slice(None), places % BLOCK_SIZE
    return keys[at], values[at]


def test_numbers_are_exact_but_for_the_smallest_of_a_row() -> None:
    torch.manual_seed(0)
    shape = TOKENS, KV_HEADS, HEAD_DIM
    spread = torch.ldexp(torch.randn(shape), torch.randint(-30, 30, shape))
    for key, value in (
        (torch.randn(shape), torch.randn(shape) * 1e-30),
        (spread, -spread.flip(0)),
        (torch.ldexp(torch.randn(shape), torch.tensor(-106)), torch.randn(shape) * 1e30),
        (torch.zeros(shape), -torch.zeros(shape)),
    ):
        key, value = key.bfloat16(), value.bfloat16()
        for got, wanted in zip(stored(key, value), (key, value), strict=True):
            wanted = wanted.double()
            largest = wanted.abs().amax(-1, keepdim=True)
            power = torch.exp2(torch.floor(torch.log2(largest.clamp(min=2.0**-126))))
            exact = wanted.abs() >= power * 2.0**-14
            assert torch.equal(got[exact], wanted[exact])
            assert ((got - wanted).abs() <= power * 2.0**-22).all()
            assert torch.equal(got[wanted == 0], wanted[wanted == 0])


def test_what_bfloat16_cannot_hold_in_full_is_zero() -> None:
    shape = TOKENS, KV_HEADS, HEAD_DIM
    key, value = torch.full(shape, 2.0**-127), torch.full(shape, 2.0**-130)
    key[..., 0] = 2.0**-126
    keys, values = stored(key.bfloat16(), value.bfloat16())
    assert (keys[..., 0] == 2.0**-126).all() and not keys[..., 1:].any() and not values.any()


@pytest.mark.parametrize("broken", [float("inf"), -float("inf"), float("nan")])
def test_what_is_no_number_breaks_its_own_row(broken: float) -> None:
    torch.manual_seed(1)
    key, value = (torch.randn(TOKENS, KV_HEADS, HEAD_DIM).bfloat16() for _ in range(2))
    key[3, 1, 5] = value[7, 0, 40] = broken
    keys, values = stored(key, value)
    assert not keys[3, 1].isfinite().any() and not values[7, 0].isfinite().any()
    keys[3, 1], values[7, 0] = key[3, 1].double(), value[7, 0].double()
    finite = key.isfinite()
    assert (keys - key.double())[finite].abs().max() < 2.0**-18
    finite = value.isfinite()
    assert (values - value.double())[finite].abs().max() < 2.0**-18


def run(assembly: str, inputs: list[int]) -> list[int]:
    """PTX over registers of 32 bits: $0 to $3 of results, $4 on of inputs."""
    registers = {f"${4 + i}": value for i, value in enumerate(inputs)}

    def value(name: str) -> int:
        return int(name, 0) if name[0].isdigit() else registers[name]

    for line in assembly.strip("{} \n").split(";"):
        operation, _, rest = line.strip().partition(" ")
        if not operation or operation == ".reg":
            continue
        target, *names = re.split(r",\s*", rest)
        a, b, *more = map(value, names)
        if operation == "prmt.b32":
            data = (a | b << 32).to_bytes(8, "little")
            (selector,) = more
            picked = bytes(data[selector >> 4 * i & 7] for i in range(4))
            found = int.from_bytes(picked, "little")
        elif operation == "lop3.b32":
            assert more[1] == 0xEA  # a & b | c
            found = a & b | more[0]
        else:
            operators = {"and.b32": and_, "shl.b32": lshift, "shr.u32": rshift}
            found = operators[operation](a, b)
        registers[target] = found & 0xFFFFFFFF
    return [registers[f"${i}"] for i in range(4)]


def numbers_of(registers: list[int]) -> list[int]:
    return [register >> shift & 0xFFFF for register in registers for shift in (0, 16)]


def test_assembly_unpacks_as_the_plain_kernels_do() -> None:
    """Each instruction by its description in the PTX ISA."""
    torch.manual_seed(2)
    numbers = torch.randint(0, 256, (200, 3, 4), dtype=torch.uint8)
    for first, second, high in numbers:
        words = [int(x.view(torch.int32)) & 0xFFFFFFFF for x in (first, second, high)]
        a, b = (high & 0x87).int(), (high.int() >> 4 & 7 | high.int() << 4 & 0x80)
        wanted_a, wanted_b = (low.int() | top << 8 for low, top in ((first, a), (second, b)))
        halves = numbers_of(run(e4m7_cache._HALVES.value, words))
        assert halves == [*wanted_a.tolist(), *wanted_b.tolist()]
