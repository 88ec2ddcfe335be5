"""The CUDA kernels on a GPU: the checks of the interpreted tests at real shapes, and graphs.

One compilation of a kernel takes a second or so; the shapes are few for that reason.
"""

from __future__ import annotations

import functools
import importlib.util
import random

import pytest
import torch

pytestmark = pytest.mark.gpu
if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)

from albireo.workers.engine.batch import StepBatch  # noqa: E402
from albireo.workers.kernels import create  # noqa: E402
from albireo.workers.kernels.cuda.few_rows import FewRowsTiling, few_rows_tiling  # noqa: E402
from albireo.workers.kernels.cuda.gemv import GemvTiling, gemv_tiling  # noqa: E402
from albireo.workers.kernels.interface import Kernels  # noqa: E402

from ..workers import cuda_kernel_checks as checks  # noqa: E402
from ..workers.cuda_kernel_checks import Conversation, Shape, on_device  # noqa: E402

DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.bfloat16, id="bfloat16"),
]
LLAMA, QWEN, SMOL = Shape(32, 8, 128), Shape(16, 8, 128), Shape(9, 3, 64)
PHI3, GEMMA = Shape(32, 32, 96), Shape(16, 8, 256, window=200)


@functools.cache
def kernels(
    dtype: torch.dtype, batch_invariant: bool = False, kv_cache_dtype: str = "model"
) -> Kernels:
    return create("cuda", dtype, batch_invariant, kv_cache_dtype=kv_cache_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_wise(dtype: torch.dtype) -> None:
    for hidden in (576, 1024, 4096):
        checks.check_norm(kernels(dtype), dtype, 70, hidden)
    for width in (1536, 12288):
        checks.check_activations(kernels(dtype), dtype, 33, width)
    for hidden in (576, 4096):
        checks.check_embed(kernels(dtype), dtype, hidden)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_drawn_shapes(dtype: torch.dtype, seed: int) -> None:
    checks.check_drawn_shapes(kernels(dtype, bool(seed % 2)), dtype, random.Random(seed), 8192)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("invariant", [False, True])
def test_linear(dtype: torch.dtype, invariant: bool) -> None:
    k = kernels(dtype, invariant)
    checks.check_linear(k, dtype, 1000, 576)
    checks.check_linear(k, dtype, 2048, 1024, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("invariant", [False, True])
def test_gated_linear(dtype: torch.dtype, invariant: bool) -> None:
    for rows in (1, 60, 100, 256, 300):
        checks.check_gated_linear(kernels(dtype, invariant), dtype, 24576, 2048, rows)


def test_one_row() -> None:
    device = torch.device("cuda")
    for n, k in ((6144, 4096), (4096, 12288), (1024, 3072), (576, 1536)):
        checks.check_gemv(device, n, k, gemv_tiling(k), torch.bfloat16)
    checks.check_gemv(device, 1003, 584, GemvTiling(4, 512, 4, 3, once=True), torch.float32)
    checks.check_gemv(device, 1003, 90, GemvTiling(2, 128, 2, 1), torch.float32)


def test_few_rows() -> None:
    device = torch.device("cuda")
    for rows, n, k in ((2, 6144, 4096), (16, 1024, 3072), (40, 4096, 12288), (64, 1024, 1024)):
        tiling = few_rows_tiling(n, k, rows)
        assert tiling is not None
        for out in (torch.bfloat16, torch.float32):
            checks.check_few_rows(device, rows, n, k, tiling, out)
    one = FewRowsTiling(64, 128, splits=1, stages=4)
    checks.check_few_rows(device, 23, 1024, 3072, one, torch.float32)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_few_rows_in_a_graph(rows: int) -> None:
    k = kernels(torch.bfloat16)
    packed = k.pack_linear(torch.randn(2048, 1024).bfloat16(), torch.randn(2048).bfloat16())
    x = torch.zeros(rows, 1024, dtype=torch.bfloat16, device=k.device)
    k.linear(x, packed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = k.linear(x, packed)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(captured, k.linear(x, packed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        LLAMA, QWEN, SMOL, PHI3, GEMMA,
        Shape(28, 4, 128, window=100), Shape(8, 1, 64), Shape(8, 4, 256), Shape(4, 2, 80),
    ],
    ids=str,
)  # fmt: skip
def test_steps_of_chunks_and_decodes(dtype: torch.dtype, shape: Shape) -> None:
    lengths = [1, 15, 16, 17, 63, 64, 65, 150, 320, 700]
    conversation = Conversation(shape, dtype, lengths, 1)
    steps = conversation.cut([1, 16, 40, 130, 300])
    checks.check_attention(kernels(dtype), conversation, steps, normed=shape in (QWEN, GEMMA))
    checks.check_attention(kernels(dtype), conversation, conversation.whole())
    checks.check_attention(kernels(dtype), conversation, conversation.decode_last())


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        LLAMA, SMOL, GEMMA, Shape(28, 4, 128, window=100), Shape(8, 4, 256), Shape(64, 1, 128),
        Shape(48, 1, 64),
    ],
    ids=str,
)  # fmt: skip
def test_a_cache_of_12_bits(shape: Shape, invariant: bool) -> None:
    """Chunks and decodes, padded, and decodes of many sequences at once."""
    k = kernels(torch.bfloat16, invariant, "e4m7")
    conversation = Conversation(shape, torch.bfloat16, [1, 15, 16, 17, 65, 150, 320, 700], 1)
    steps = conversation.cut([1, 16, 40, 130, 300])
    checks.check_attention(k, conversation, steps, normed=shape == GEMMA)
    checks.check_attention(k, conversation, conversation.decode_last(), padding=(100, 200, 60))
    many = Conversation(shape, torch.bfloat16, [1 + 37 * i % 200 for i in range(70)], 2)
    first = checks.check_attention(k, many, many.decode_last())
    _, again = many.run(k, many.decode_last())
    assert torch.equal(again, first)
    _, same = many.run(kernels(torch.bfloat16, invariant), many.decode_last())
    assert (first.double() - same.double()).norm() / same.double().norm() < 1e-3


def test_the_smallest_numbers_of_a_cache_of_12_bits_count() -> None:
    checks.check_small_numbers_count(kernels(torch.bfloat16, kv_cache_dtype="e4m7"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sequences", [1, 7, 70])
def test_decodes_of_any_number(dtype: torch.dtype, sequences: int) -> None:
    """From many splits a row to one; and the same bits each time, whoever finishes last."""
    lengths = [3000 if sequences == 1 else 1 + 37 * i % 500 for i in range(sequences)]
    conversation = Conversation(LLAMA, dtype, lengths, sequences)
    first = checks.check_attention(kernels(dtype), conversation, conversation.decode_last())
    for _ in range(5):
        _, again = conversation.run(kernels(dtype), conversation.decode_last())
        assert torch.equal(again, first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_chunking_gives_the_same_bits_when_asked(dtype: torch.dtype) -> None:
    conversation = Conversation(Shape(8, 2, 64, window=90), dtype, [200, 33, 5, 129], 1)
    k = kernels(dtype, True)
    whole = checks.check_attention(k, conversation, conversation.whole())
    cut = checks.check_attention(k, conversation, conversation.cut([1, 5, 16, 70]))
    assert torch.equal(cut, whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("invariant", [False, True])
def test_a_padded_step_is_the_same_step(dtype: torch.dtype, invariant: bool) -> None:
    """Spare rows of NaN, empty chunks and decodes: attention's grid is that of a captured size."""
    conversation = Conversation(LLAMA, dtype, [1, 16, 65, 150, 320, 700], 2)
    k = kernels(dtype, invariant)
    steps = conversation.cut([1, 16, 40, 300])
    for padding in ((0, 3, 2), (100, 200, 60)):
        padded = checks.check_attention(k, conversation, steps, padding=padding)
        if invariant:
            assert torch.equal(padded, checks.check_attention(k, conversation, steps))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    checks.check_nan_stays_in_its_row(kernels(dtype), dtype)


@pytest.mark.parametrize("cache", ["model", "e4m7"])
@pytest.mark.parametrize(("sequences", "chunk"), [(2, 0), (80, 0), (9, 30)])
def test_a_captured_step_serves_any_lengths(sequences: int, chunk: int, cache: str) -> None:
    """One graph of a layer's kernels, replayed as contexts grow: the bits of eager launches.

    chunk: tokens that the first of the sequences feeds, all others decode.
    """
    shape, dtype, k = LLAMA, torch.bfloat16, kernels(torch.bfloat16, kv_cache_dtype=cache)
    conversation = Conversation(shape, dtype, [400] * sequences, 0)
    kv = checks.empty_cache(k, conversation.paged, shape, dtype)
    for each in (kv.keys, kv.values):
        each.zero_() if each.dtype == torch.uint8 else each.normal_()
    rope = conversation.rope.to(k.device)
    head = k.pack_linear(
        torch.randn(64, shape.heads * shape.head_dim).to(dtype), None, torch.float32
    )

    def inputs(position: int) -> StepBatch:
        chunks = [
            (s, position * (s + 1) % (400 - chunk), 1 if s or not chunk else chunk)
            for s in range(sequences)
        ]
        batch = on_device(conversation.paged.batch(chunks), k.device)
        batch.num_chunks = int(chunk > 0)
        return batch

    def layer(batch: StepBatch) -> torch.Tensor:
        q = k.rope_and_cache(
            qkv, shape.heads, shape.kv_heads, shape.head_dim, None, None, 1e-6, rope, batch, kv
        )
        return k.linear(k.attention(q, kv, batch, 0.1, 0), head)

    rows = sequences + max(chunk - 1, 0)
    qkv = torch.randn(rows, shape.qkv_width, device=k.device, dtype=dtype)
    static = inputs(5)
    layer(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(static)
    for position in (0, 31, 32, 397):
        batch = inputs(position)
        expected = layer(batch)
        for name in ("positions", "kv_index", "context_len"):
            getattr(static, name).copy_(getattr(batch, name))
        graph.replay()
        assert torch.equal(captured, expected)
