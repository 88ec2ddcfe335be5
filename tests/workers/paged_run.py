"""Runs prompts through Models as an engine would, and returns the logits of every position.

Prompts advance by random pieces, several to a step, over a paged cache whose
blocks are scattered and full of NaN: what is not written must not be read.
The ranks of a group run as threads, with a communicator that meets at barriers.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from albireo.workers.engine.batch import StepBatch
from albireo.workers.kernels.interface import Kernels, KVLayer
from albireo.workers.models.config import ModelConfig
from albireo.workers.models.llama import Model
from albireo.workers.models.load import load_model
from albireo.workers.parallel.communicator import Unfused

from .paged import poison

_MAX_CHUNK = 9
_SPARE_BLOCKS = 3


@dataclass(slots=True)
class _Sequence:
    tokens: list[int]
    slot: int
    done: int = 0


class _Meeting:
    """Where the ranks of a group exchange tensors.

    turn: held by the one thread that computes; kernels are made for one at a time.
    """

    def __init__(self, size: int) -> None:
        self.turn = threading.Lock()
        self.barrier = threading.Barrier(size, timeout=60)
        self.parts: list[torch.Tensor] = [torch.empty(0)] * size


class ThreadCommunicator(Unfused):
    """The Communicator of one thread among `size`."""

    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        self.rank = rank
        self.size = size
        self._meeting = meeting

    def all_reduce(self, x: torch.Tensor) -> None:
        meeting = self._meeting
        meeting.parts[self.rank] = x.clone()
        meeting.turn.release()
        try:
            meeting.barrier.wait()
            total = torch.stack(meeting.parts).float().sum(0)
            meeting.barrier.wait()
        finally:
            meeting.turn.acquire()
        x.copy_(total)


class PagedRun:
    """Some prompts on the ranks of one group.

    kernels: those the models were packed with.  sampled: share of the rows whose
    logits are asked for.  seed: of chunk sizes, order, block tables and sampled rows.
    """

    def __init__(
        self,
        models: Sequence[Model],
        kernels: Kernels,
        dtype: torch.dtype,
        prompts: Sequence[Sequence[int]],
        seed: int = 0,
        sampled: float = 1.0,
        block_size: int = 16,
    ) -> None:
        self._models = models
        self._device = kernels.device
        self._random = random.Random(seed)
        self._sampled = sampled
        self._block_size = block_size
        slots = self._random.sample(range(len(prompts) + 2), len(prompts))
        self._sequences = [_Sequence(list(p), s) for p, s in zip(prompts, slots, strict=True)]
        self._block_tables, self._num_blocks = self._scattered_tables()
        self._caches = [self._caches_of(model, kernels, dtype) for model in models]
        self._meeting = _Meeting(len(models))
        for model in models:
            model.communicator = ThreadCommunicator(model.rank, len(models), self._meeting)

    def logits(self) -> list[torch.Tensor]:
        """[len(prompt), vocab] float32 of each prompt; rows that were not sampled are NaN."""
        vocab_size = self._models[0].config.vocab_size
        logits = [torch.full((len(s.tokens), vocab_size), torch.nan) for s in self._sequences]
        with ThreadPoolExecutor(len(self._models)) as threads, torch.inference_mode():
            while any(s.done < len(s.tokens) for s in self._sequences):
                batch, owners = self._next_step()
                steps = [
                    threads.submit(self._forward, model, batch, caches)
                    for model, caches in zip(self._models, self._caches, strict=True)
                ]
                shards = [step.result(timeout=60) for step in steps]
                assert all(shard.dtype == torch.float32 for shard in shards)
                assert all(len(shard) == len(owners) for shard in shards)
                for (owner, position), row in zip(owners, torch.cat(shards, dim=1), strict=True):
                    logits[owner][position] = row
        return logits

    def _forward(self, model: Model, batch: StepBatch, caches: list[KVLayer]) -> torch.Tensor:
        with self._meeting.turn, torch.inference_mode():
            return model.forward(batch, caches).cpu()

    def _scattered_tables(self) -> tuple[torch.Tensor, int]:
        """Block tables, and how many blocks there are."""
        blocks = [-(-len(s.tokens) // self._block_size) for s in self._sequences]
        total = sum(blocks) + _SPARE_BLOCKS
        free = self._random.sample(range(total), total)
        rows = max(s.slot for s in self._sequences) + 1
        # Entries past a context are stale: here, any block's number.
        tables = torch.tensor(
            [[self._random.randrange(total) for _ in range(max(blocks) + 2)] for _ in range(rows)],
            dtype=torch.int32,
        )
        for sequence, count in zip(self._sequences, blocks, strict=True):
            for entry in range(count):
                tables[sequence.slot, entry] = free.pop()
        return tables, total

    def _caches_of(self, model: Model, kernels: Kernels, dtype: torch.dtype) -> list[KVLayer]:
        config = model.config
        caches = [
            kernels.new_kv_layer(
                self._num_blocks,
                self._block_size,
                config.num_kv_heads // model.tp,
                config.head_dim,
                dtype,
            )
            for _ in range(config.num_layers)
        ]
        for cache in caches:
            poison(cache)
        return caches

    def _next_step(self) -> tuple[StepBatch, list[tuple[int, int]]]:
        """A random step, and (prompt, position) of each row that it samples."""
        waiting = [i for i, s in enumerate(self._sequences) if s.done < len(s.tokens)]
        chosen = self._random.sample(waiting, self._random.randint(1, len(waiting)))
        pieces = []
        for i in chosen:
            left = len(self._sequences[i].tokens) - self._sequences[i].done
            pieces.append((i, min(left, self._random.randint(1, _MAX_CHUNK))))
        chunks = [p for p in pieces if p[1] > 1]
        ordered = chunks + [p for p in pieces if p[1] == 1]
        tokens, positions, index, owners, starts = [], [], [], [], [0]
        for i, count in ordered:
            sequence = self._sequences[i]
            span = range(sequence.done, sequence.done + count)
            tokens += sequence.tokens[span.start : span.stop]
            positions += span
            index += [self._kv_index(sequence.slot, position) for position in span]
            owners += [(i, position) for position in span]
            starts.append(starts[-1] + count)
            sequence.done += count
        rows = [r for r in range(len(tokens)) if self._random.random() < self._sampled]
        batch = StepBatch(
            tokens=self._int32(tokens),
            positions=self._int32(positions),
            kv_index=self._int32(index),
            query_start=self._int32(starts),
            context_len=self._int32([self._sequences[i].done for i, _ in ordered]),
            slots=self._int32([self._sequences[i].slot for i, _ in ordered]),
            block_tables=self._block_tables.to(self._device),
            sample_rows=self._int32(rows),
            num_chunks=len(chunks),
        )
        return batch, [owners[row] for row in rows]

    def _kv_index(self, slot: int, position: int) -> int:
        block, offset = divmod(position, self._block_size)
        return int(self._block_tables[slot, block]) * self._block_size + offset

    def _int32(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=self._device)


def dummy_logits(
    config: ModelConfig, kernels: Kernels, tp: int, prompts: Sequence[Sequence[int]]
) -> torch.Tensor:
    """[tokens of all prompts, vocab] float32 of a model of made-up weights in bfloat16."""
    dtype = torch.bfloat16
    models = load_model("", config, dtype, "dummy", tp, kernels, lambda _: None)
    return torch.cat(PagedRun(models, kernels, dtype, prompts, seed=tp).logits())
