"""SlotTable against a model of the plan's meaning in plain Python, over random plans."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo.ipc.plan import PlanView, split64
from albireo.workers.engine.batch import StepBatch
from albireo.workers.engine.slots import SlotTable
from albireo.workers.sampling.draw import NOT_FINITE

from ..plans import plan_of

SLOTS, BLOCK_SIZE, MAX_BLOCKS, BATCHED = 6, 4, 8, 24
MAX_LEN = MAX_BLOCKS * BLOCK_SIZE


def float_bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


@dataclass
class PlanText:
    """A plan as lists; `view` goes through the real record."""

    take: list[list[int]] = field(default_factory=list)
    append: list[list[int]] = field(default_factory=list)
    chunk: list[list[int]] = field(default_factory=list)
    chunk_token: list[int] = field(default_factory=list)
    decode: list[int] = field(default_factory=list)

    def view(self) -> PlanView:
        return plan_of(
            SLOTS, BATCHED, BLOCK_SIZE, MAX_LEN, step=1,
            take=self.take, append=self.append, chunk=self.chunk,
            chunk_token=self.chunk_token, decode=self.decode,
        )  # fmt: skip


@dataclass
class Sequence:
    """One request as the model knows it: what it has fed, and where."""

    request: int
    seed: int
    temperature: float
    position: int
    target: int
    last_token: int = 0
    blocks: list[int] = field(default_factory=list)


@dataclass
class Expected:
    """What a plan makes of the step, row by row."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    kv_index: list[int] = field(default_factory=list)
    query_start: list[int] = field(default_factory=lambda: [0])
    context_len: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    sample_rows: list[int] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)
    draw_positions: list[int] = field(default_factory=list)
    sampled_slots: list[int] = field(default_factory=list)

    def feed(self, slot: int, sequence: Sequence, tokens: list[int], samples: bool) -> None:
        for token in tokens:
            position = sequence.position
            self.tokens.append(token)
            self.positions.append(position)
            block = sequence.blocks[position // BLOCK_SIZE]
            self.kv_index.append(block * BLOCK_SIZE + position % BLOCK_SIZE)
            sequence.position += 1
        self.query_start.append(len(self.tokens))
        self.context_len.append(sequence.position)
        self.slots.append(slot)
        if samples:
            self.sample_rows.append(len(self.tokens) - 1)
            self.requests.append(sequence.request)
            self.draw_positions.append(sequence.position)
            self.sampled_slots.append(slot)


class Scheduler:
    """Makes random plans that a scheduler could make, and says what they mean."""

    def __init__(self, choose: random.Random) -> None:
        self.choose = choose
        self.running: dict[int, Sequence] = {}
        self.requests = 0

    def plan(self) -> tuple[PlanText, Expected]:
        plan, expected = PlanText(), Expected()
        for slot in list(self.running):
            done = self.running[slot].position >= MAX_LEN
            if done or self.choose.random() < 0.15:  # Finished, cancelled or preempted.
                del self.running[slot]
        for slot in range(SLOTS):
            if slot not in self.running and self.choose.random() < 0.5:
                self.take(plan, slot)
        decodes = self.chunks(plan, expected)
        self.choose.shuffle(decodes)
        for slot in decodes:
            sequence = self.running[slot]
            self.append_blocks(plan, slot, sequence.position + 1)
            plan.decode.append(slot)
            expected.feed(slot, sequence, [sequence.last_token], True)
        return plan, expected

    def take(self, plan: PlanText, slot: int) -> None:
        self.requests += 1
        start = BLOCK_SIZE * self.choose.randrange(3)  # Blocks of a cached prefix.
        sequence = Sequence(
            request=self.requests,
            seed=self.choose.getrandbits(64) - 2**63,
            temperature=self.choose.choice([0.0, 0.5, 1.0]),
            position=start,
            target=start + self.choose.randrange(1, MAX_LEN - start + 1),
        )
        self.running[slot] = sequence
        bits = [float_bits(sequence.temperature), 7, float_bits(0.9), float_bits(0.1)]
        plan.take.append(
            [slot, sequence.request, *split64(sequence.seed), *bits, sequence.target, start]
        )
        self.append_blocks(plan, slot, start)

    def append_blocks(self, plan: PlanText, slot: int, length: int) -> None:
        sequence = self.running[slot]
        while len(sequence.blocks) * BLOCK_SIZE < length:
            block = self.choose.randrange(1000)
            plan.append.append([slot, len(sequence.blocks), block])
            sequence.blocks.append(block)

    def chunks(self, plan: PlanText, expected: Expected) -> list[int]:
        """Adds chunks within the token budget; returns the slots that may decode."""
        budget, decodes = BATCHED, []
        order = list(self.running)
        self.choose.shuffle(order)
        for slot in order:
            sequence = self.running[slot]
            left = sequence.target - sequence.position
            if left <= 0:
                if self.choose.random() < 0.9:
                    decodes.append(slot)
                continue
            length = min(left, budget, self.choose.randrange(1, MAX_LEN))
            if length == 0:
                continue
            budget -= length
            tokens = [self.choose.randrange(50000) for _ in range(length)]
            samples = length == left
            self.append_blocks(plan, slot, sequence.position + length)
            plan.chunk.append([slot, sequence.position, length, int(samples)])
            plan.chunk_token.extend(tokens)
            expected.feed(slot, sequence, tokens, samples)
        return decodes


def assert_batch(batch: StepBatch, expected: Expected) -> None:
    for name in (
        "tokens",
        "positions",
        "kv_index",
        "query_start",
        "context_len",
        "slots",
        "sample_rows",
    ):
        tensor = getattr(batch, name)
        assert tensor.dtype == torch.int32
        assert tensor.tolist() == getattr(expected, name), name


@settings(max_examples=40, deadline=None)
@given(choose=st.randoms(use_true_random=False), steps=st.integers(1, 25))
def test_any_sequence_of_plans_means_what_the_layout_says(
    choose: random.Random, steps: int
) -> None:
    scheduler = Scheduler(choose)
    table = SlotTable(SLOTS, MAX_BLOCKS, BATCHED, BLOCK_SIZE)
    for _ in range(steps):
        plan, expected = scheduler.plan()
        batch = table.apply(plan.view())
        assert_batch(batch, expected)
        assert batch.num_chunks == len(plan.chunk)
        assert table.rows.slots.tolist() == expected.sampled_slots
        assert table.rows.requests.tolist() == expected.requests
        assert table.rows.positions.tolist() == expected.draw_positions
        for slot, sequence in scheduler.running.items():
            blocks = batch.block_tables[slot, : len(sequence.blocks)].tolist()
            assert blocks == sequence.blocks
            assert int(table.params.seed[slot]) == sequence.seed % 2**64
            assert table.params.temperature[slot] == np.float32(sequence.temperature)
            assert table.params.top_k[slot] == 7
            assert table.params.top_p[slot] == np.float32(0.9)
            assert table.params.min_p[slot] == np.float32(0.1)

        tokens = [choose.choice([NOT_FINITE, choose.randrange(50000)]) for _ in expected.requests]
        rows = table.commit(np.array(tokens, np.int32))
        assert rows.tolist() == [
            [request, int(token >= 0), max(token, 0)]
            for request, token in zip(expected.requests, tokens, strict=True)
        ]
        for slot, token in zip(expected.sampled_slots, tokens, strict=True):
            scheduler.running[slot].last_token = max(token, 0)


def test_steady_decode_reuses_its_memory() -> None:
    table = SlotTable(SLOTS, MAX_BLOCKS, BATCHED, BLOCK_SIZE)
    takes = [[slot, slot + 1, 0, 0, 0, 0, 0, 0, 4, 0] for slot in range(3)]
    chunk = [[slot, 0, 4, 1] for slot in range(3)]
    table.apply(PlanText(takes, [], chunk, [5] * 12, []).view())
    table.commit(np.array([1, 2, 3], np.int32))
    addresses = set()
    for step in range(3):
        batch = table.apply(PlanText(decode=[2, 0, 1]).view())
        assert batch.positions.tolist() == [4 + step] * 3
        addresses.add((batch.tokens.data_ptr(), batch.kv_index.data_ptr()))
        table.commit(np.array([7, 8, 9], np.int32))
    assert len(addresses) == 1


def test_a_chunk_that_leaves_a_gap_is_refused() -> None:
    table = SlotTable(SLOTS, MAX_BLOCKS, BATCHED, BLOCK_SIZE)
    take = [[2, 1, 0, 0, 0, 0, 0, 0, 9, 4]]
    with pytest.raises(ValueError, match="slot 2 starts at position 5, but the slot holds 4"):
        table.apply(PlanText(take, [], [[2, 5, 2, 0]], [1, 1], []).view())


def test_a_plan_whose_tokens_and_chunks_disagree_is_refused() -> None:
    table = SlotTable(SLOTS, MAX_BLOCKS, BATCHED, BLOCK_SIZE)
    with pytest.raises(ValueError, match="cover 2 tokens, but it carries 3"):
        table.apply(PlanText(chunk=[[0, 0, 2, 0]], chunk_token=[1, 1, 1]).view())


def test_a_plan_beyond_the_tables_is_refused() -> None:
    table = SlotTable(2, MAX_BLOCKS, 4, BLOCK_SIZE)
    with pytest.raises(ValueError, match="7 rows in 1 sequences exceeds the tables of 6 rows"):
        table.apply(PlanText(chunk=[[0, 0, 7, 0]], chunk_token=[1] * 7).view())


def test_scored_rows_come_after_those_that_are_sampled() -> None:
    table = SlotTable(SLOTS, MAX_BLOCKS, BATCHED, BLOCK_SIZE)
    takes = [[slot, slot + 11, 0, 0, 0, 0, 0, 0, 9, start] for slot, start in ((1, 4), (3, 0))]
    chunk = [[1, 4, 5, 1], [3, 0, 3, 0]]
    score = [[0, 70], [3, 73], [5, 80], [7, 82]]
    plan = plan_of(
        SLOTS, BATCHED, BLOCK_SIZE, MAX_LEN, take=takes, chunk=chunk, chunk_token=[1] * 8,
        score=score,
    )  # fmt: skip
    batch = table.apply(plan)
    assert batch.sample_rows.tolist() == [4, 0, 3, 5, 7]
    scores = table.scores(plan)
    assert scores.requests.tolist() == [12, 12, 14, 14]
    assert scores.positions.tolist() == [5, 8, 1, 3]
    assert scores.tokens.tolist() == [70, 73, 80, 82]
    assert len(table.rows) == 1


@pytest.mark.parametrize("row", [-1, 5])
def test_a_score_outside_the_chunks_is_refused(row: int) -> None:
    table = SlotTable(SLOTS, MAX_BLOCKS, BATCHED, BLOCK_SIZE)
    plan = plan_of(
        SLOTS, BATCHED, BLOCK_SIZE, MAX_LEN, chunk=[[1, 0, 5, 1]], chunk_token=[1] * 5,
        score=[[row, 7]],
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"with 5 rows of chunks scores rows {row} to {row}"):
        table.apply(plan)
