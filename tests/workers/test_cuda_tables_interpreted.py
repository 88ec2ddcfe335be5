"""The GPU's slot tables against the CPU's, over random plans, in Triton's interpreter."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from albireo.ipc.plan import PlanView, split64
from albireo.workers.engine.batch import StepBatch
from albireo.workers.engine.slots import SlotTable

from ..plans import plan_of
from .interpreted import use_interpreter

use_interpreter()

from albireo.workers.engine.cuda import apply_plan  # noqa: E402
from albireo.workers.engine.cuda.gather import gather_decodes, gather_mixed  # noqa: E402
from albireo.workers.engine.cuda.graphs import captured_sizes  # noqa: E402
from albireo.workers.engine.cuda.mixed_sizes import MixedSize, size_of  # noqa: E402
from albireo.workers.engine.cuda.slot_tables import SlotTables  # noqa: E402

SLOTS, BLOCK_SIZE, MAX_BLOCKS, BATCHED, BLOCKS = 11, 4, 9, 48, 200
MAX_LEN = BLOCK_SIZE * MAX_BLOCKS


class RandomPlans:
    """Plans as a scheduler could make them: prompts in chunks, decodes, slots used again."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._position = [0] * SLOTS
        self._prompt = [0] * SLOTS
        self._appended = [0] * SLOTS
        self._numbers = 0

    def next(self) -> PlanView:
        pick = self._random
        take, append, chunk, tokens, decode = [], [], [], [], []
        for slot in range(SLOTS):
            action = pick.choice(("rest", "take", "go on", "go on"))
            if action == "take":
                self._numbers += 1
                self._position[slot], self._appended[slot] = 0, 0
                self._prompt[slot] = pick.randint(1, MAX_LEN - 2)
                take.append(self._take_words(slot))
            if action == "rest" or not self._prompt[slot]:
                continue
            at, prompt = self._position[slot], self._prompt[slot]
            if at < prompt:
                length = min(pick.randint(1, 20), prompt - at, BATCHED - len(tokens))
                if length:
                    chunk.append([slot, at, length, int(at + length == prompt)])
                    tokens += [pick.randrange(1000) for _ in range(length)]
            else:
                length = int(at < MAX_LEN - 1)
                decode += [slot] * length
            append += self._new_blocks(slot, at + length)
            self._position[slot] += length
        pick.shuffle(decode)
        return _plan(take, append, chunk, tokens, decode)

    def _take_words(self, slot: int) -> list[int]:
        pick = self._random
        floats = [pick.choice((0.0, 0.7)), pick.random(), pick.random()]
        heat, nucleus, least = (int(np.float32(each).view(np.int32)) for each in floats)
        seed = split64(pick.randrange(2**64))
        return [slot, self._numbers, *seed, heat, pick.randrange(9), nucleus, least, 0, 0]

    def _new_blocks(self, slot: int, length: int) -> list[list[int]]:
        needed = -(-length // BLOCK_SIZE)
        new = range(self._appended[slot], needed)
        self._appended[slot] = max(needed, self._appended[slot])
        return [[slot, index, self._random.randrange(BLOCKS)] for index in new]


def _plan(take: list, append: list, chunk: list, tokens: list, decode: list) -> PlanView:
    return plan_of(
        SLOTS, BATCHED, BLOCK_SIZE, MAX_LEN, step=1,
        take=take, append=append, chunk=chunk, chunk_token=tokens, decode=decode,
    )  # fmt: skip


def gpu_tables() -> SlotTables:
    tables = SlotTables(SLOTS, SLOTS, MAX_BLOCKS, BATCHED, BLOCK_SIZE, 1000, 0, torch.device("cpu"))
    tables.pad_into(BLOCKS)
    return tables


def gather(tables: SlotTables, plan: PlanView, padding: MixedSize | None = None) -> StepBatch:
    """As StepParts.forward_mixed; padding: what the step's size is enlarged by."""
    size = size_of(plan, int((plan.chunk[:, 3] != 0).sum()) + len(plan.decode))
    if padding is not None:
        size = MixedSize(*(own + more for own, more in zip(size, padding, strict=True)))
    tables.words[: len(plan.words)] = torch.from_numpy(plan.words.copy())
    apply_plan.apply(tables)
    gather_mixed(tables, size)
    return tables.batch(size)


FIELDS = ("tokens", "positions", "kv_index", "query_start", "context_len", "slots", "sample_rows")


@pytest.mark.parametrize("seed", range(4))
def test_the_tables_agree_with_those_of_the_cpu(seed: int) -> None:
    plans = RandomPlans(seed)
    numbers = np.random.default_rng(seed)
    cpu = SlotTable(SLOTS, MAX_BLOCKS, BATCHED, BLOCK_SIZE)
    gpu = gpu_tables()
    for _ in range(40):
        plan = plans.next()
        if not len(plan.chunk) and not len(plan.decode):
            continue
        expected, batch = cpu.apply(plan), gather(gpu, plan)
        for field in FIELDS:
            assert torch.equal(getattr(batch, field), getattr(expected, field)), field
        assert batch.num_chunks == expected.num_chunks
        rows = len(cpu.rows)
        assert np.array_equal(gpu.sample_slots[:rows].numpy(), cpu.rows.slots)
        assert np.array_equal(gpu.draw_position[:rows].numpy(), cpu.rows.positions)
        used = np.unique(plan.take[:, 0])
        for name in ("temperature", "top_k", "top_p", "min_p"):
            there, here = getattr(gpu, name)[used].numpy(), getattr(cpu.params, name)[used]
            assert np.array_equal(there, here), name
        assert np.array_equal(gpu.seed[used].numpy().view(np.uint64), cpu.params.seed[used])
        tokens = numbers.integers(-1, 1000, rows).astype(np.int32)
        cpu.commit(tokens)
        gpu.sampled[:rows] = torch.from_numpy(tokens)
        apply_plan.advance(gpu, len(batch.slots), rows)
        assert np.array_equal(gpu.position[:SLOTS].numpy(), cpu.state.position)
        assert np.array_equal(gpu.last_token[:SLOTS].numpy(), cpu.state.last_token)


@pytest.mark.parametrize("seed", range(2))
def test_a_padded_step_is_the_same_step(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Places of chunks and decodes that are empty, rows and logits of nobody, behind each."""
    # More programs than one.
    monkeypatch.setattr(f"{gather_mixed.__module__}._BLOCK", 16)
    plans, chance = RandomPlans(seed), random.Random(seed)
    exact, padded = gpu_tables(), gpu_tables()
    for _ in range(8):
        plan = plans.next()
        if not len(plan.chunk) and not len(plan.decode):
            continue
        n_chunk, n_decode = len(plan.chunk), len(plan.decode)
        chunks, decodes = chance.randrange(SLOTS - n_chunk + 1), chance.randrange(4)
        decodes = min(decodes, SLOTS - n_decode)
        rows = len(plan.chunk_token) + n_decode
        spare = chance.choice((0, 1, BATCHED + SLOTS - rows))
        more = MixedSize(spare, chunks, decodes, chance.randrange(3))
        wanted = gather(exact, plan)
        # What was there before must not matter.
        for name in FIELDS:
            getattr(padded, name).fill_(-7)
        got = gather(padded, plan, more)
        assert torch.equal(got.tokens[:rows], wanted.tokens)
        assert torch.equal(got.positions[:rows], wanted.positions)
        assert torch.equal(got.kv_index[:rows], wanted.kv_index)
        assert got.tokens[rows:].tolist() == [0] * more.rows
        assert got.positions[rows:].tolist() == [0] * more.rows
        assert set(got.kv_index[rows:].tolist()) <= set(range(BLOCKS * 4, BLOCKS * 4 + 4))
        sampled = len(wanted.sample_rows)
        assert torch.equal(got.sample_rows[:sampled], wanted.sample_rows)
        assert got.sample_rows[sampled:].tolist() == [0] * more.logits
        assert got.num_chunks == n_chunk + chunks
        for name, nothing in (("slots", SLOTS), ("context_len", 0)):
            parts = getattr(wanted, name).split([n_chunk, n_decode])
            expected = [*parts[0].tolist(), *[nothing] * chunks]
            expected += [*parts[1].tolist(), *[nothing] * decodes]
            assert getattr(got, name).tolist() == expected, name
        starts = wanted.query_start.tolist()
        expected = [*starts[:n_chunk], *[starts[n_chunk]] * chunks]
        expected += [*starts[n_chunk:], *[starts[-1]] * decodes]
        assert got.query_start.tolist() == expected
        for tables, batch in ((exact, wanted), (padded, got)):
            tables.sampled[:sampled] = torch.arange(sampled, dtype=torch.int32)
            apply_plan.advance(tables, len(batch.slots), sampled)
        for name in ("position", "last_token", "sample_slots", "draw_position"):
            count = None if name in ("position", "last_token") else sampled
            assert torch.equal(getattr(padded, name)[:count], getattr(exact, name)[:count]), name


def test_padding_rows_are_the_dummy_slot_and_leave_nothing() -> None:
    tables = gpu_tables()
    tables.position[:] = torch.arange(SLOTS + 1, dtype=torch.int32) % 8
    tables.position[SLOTS] = 0
    before = tables.position.clone()
    plan = _plan([], [], [], [], [3, 1])
    tables.words[: len(plan.words)] = torch.from_numpy(plan.words.copy())
    apply_plan.apply(tables)
    gather_decodes(tables, 8)
    assert tables.slots[:8].tolist() == [3, 1] + [SLOTS] * 6
    assert tables.positions[2:8].tolist() == [0] * 6
    assert tables.kv_index[2:8].tolist() == [BLOCKS * BLOCK_SIZE] * 6
    assert tables.query_start[:9].tolist() == list(range(9))
    assert tables.context_len[:8].tolist() == [4, 2] + [1] * 6
    tables.sampled[:8] = torch.arange(8, dtype=torch.int32) + 20
    apply_plan.advance(tables, 8, 8)
    before[3] += 1
    before[1] += 1
    assert torch.equal(tables.position, before)
    assert (int(tables.last_token[3]), int(tables.last_token[1])) == (20, 21)
    assert int(tables.last_token[SLOTS]) == 0


@pytest.mark.parametrize("most", [1, 2, 7, 8, 64, 100, 256, 1000])
def test_captured_sizes(most: int) -> None:
    sizes = captured_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1 and sizes[-1] == most
    assert all(b <= max(2 * a, a + 32) for a, b in itertools.pairwise(sizes))
