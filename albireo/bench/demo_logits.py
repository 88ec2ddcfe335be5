"""How many rows the candidates of `vocab` do not decide, on logits of the demo model.

Random logits say little about that: their tails are flat.  Here the demo model answers
questions at temperature 1, on the CPU, and the CPU's sampler takes the logits of every
token in `vocab`, on as many ranks as asked for (threads of this process).  A GPU's
candidates are as many (sampling/cuda/candidates.py).
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from .nodes import BenchError
from .sampling_kinds import KINDS, Kind

if TYPE_CHECKING:
    import torch

    from albireo.workers.engine.batch import StepBatch

_TOKENS = 48
_BLOCK = 16
_BLOCKS = 8
"""Of a sequence: room for a question and its answer."""
_TIMEOUT_S = 60.0
_QUESTIONS = (
    "Write a short story about a lighthouse keeper.",
    "What is photosynthesis?",
    "Give me three tips for learning a language.",
    "Write a Python function that reverses a list.",
    "Why is the sky blue?",
    "Name some rivers of Europe and where they end.",
    "Summarize the plot of Hamlet.",
    "How do I bake bread?",
)


def demo_left(ranks: int) -> dict[str, Any]:
    """Rows that leave `vocab`, by kind of request, as shares.  Raises BenchError."""
    from albireo.node.demo_model import FetchError, fetch_demo_model

    try:
        logits = _answers(str(fetch_demo_model()))
    except FetchError as error:
        raise BenchError(str(error)) from None
    vocab = logits.shape[1]
    if vocab % ranks:
        raise BenchError(f"the demo model's {vocab} tokens do not divide by {ranks} ranks")
    shares = {
        kind.name: round(_undecided(logits, kind, ranks) / len(logits), 4)
        for kind in KINDS
        if kind.filtered and not kind.penalized
    }
    return {"rows": len(logits), "ranks": ranks, "left": shares}


def _answers(path: str) -> torch.Tensor:
    """[questions * _TOKENS, vocab] float32: the logits of every token of the answers."""
    import torch

    from albireo.ipc.protocol import ChatMessage
    from albireo.workers.kernels import create
    from albireo.workers.models.load import load_model, read_config
    from albireo.workers.tokenizer.text_model import load_text_model

    config = read_config(path)
    kernels = create("cpu", torch.float32, False)
    (model,) = load_model(path, config, torch.float32, "auto", 1, kernels, lambda line: None)
    text = load_text_model(path)
    count = len(_QUESTIONS)
    caches = [
        kernels.new_kv_layer(
            count * _BLOCKS, _BLOCK, config.num_kv_heads, config.head_dim, torch.float32
        )
        for _ in range(config.num_layers)
    ]
    found = []
    pieces = [
        text.encode_chat([ChatMessage(role="user", content=question)]) for question in _QUESTIONS
    ]
    done = [0] * count
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for _ in range(_TOKENS):
            logits = model.forward(_batch(pieces, done), caches).clone()
            found.append(logits)
            done = [at + len(piece) for at, piece in zip(done, pieces, strict=True)]
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            pieces = drawn.tolist()
    return torch.cat(found)


def _batch(pieces: list[list[int]], done: list[int]) -> StepBatch:
    """The pieces go on from where their sequences are; the last row of each is sampled."""
    import torch

    from albireo.workers.engine.batch import StepBatch

    def ints(values: Any) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int32)

    ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    positions = [range(at, at + len(piece)) for at, piece in zip(done, pieces, strict=True)]
    tables = torch.arange(len(pieces) * _BLOCKS, dtype=torch.int32).view(-1, _BLOCKS)
    return StepBatch(
        tokens=ints(token for piece in pieces for token in piece),
        positions=ints(p for span in positions for p in span),
        kv_index=ints(i * _BLOCKS * _BLOCK + p for i, span in enumerate(positions) for p in span),
        query_start=ints([0, *ends]),
        context_len=ints(span.stop for span in positions),
        slots=ints(range(len(pieces))),
        block_tables=tables,
        sample_rows=ints(end - 1 for end in ends),
        num_chunks=len(pieces) if done[0] == 0 else 0,
    )


def _undecided(logits: torch.Tensor, kind: Kind, ranks: int) -> int:
    """Rows of logits that the candidates of `ranks` shards leave."""
    import numpy as np

    from albireo.ipc.shared_memory import create
    from albireo.workers.parallel.shared import SharedMemoryCommunicator, shared_bytes, slab_bytes
    from albireo.workers.sampling.params import SampleRows, SlotParams
    from albireo.workers.sampling.sampler import VOCAB, Sampler

    if ranks == 1:
        return 0
    count, vocab = logits.shape
    most = 64
    params = SlotParams.zeros(count)
    for name in ("temperature", "top_k", "top_p", "min_p"):
        getattr(params, name)[:] = getattr(kind, name)
    shape = (ranks, 1, 64, most, vocab)
    memfd = create("bench.comm", shared_bytes(*shape))

    def run(rank: int) -> int:
        communicator = SharedMemoryCommunicator(memfd, rank, ranks, slab_bytes(*shape), _TIMEOUT_S)
        sampler = Sampler(vocab, most, communicator, VOCAB)
        shard = logits.chunk(ranks, dim=1)[rank].contiguous()
        for first in range(0, count, most):
            numbers = np.arange(first, min(first + most, count), dtype=np.int32)
            sampler.sample(
                shard[first : first + most], SampleRows(numbers, numbers, numbers), params
            )
        return sampler.undecided

    try:
        with ThreadPoolExecutor(ranks) as threads:
            return next(iter(list(threads.map(run, range(ranks)))))
    finally:
        os.close(memfd)
