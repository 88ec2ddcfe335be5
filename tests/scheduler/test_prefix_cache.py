"""What is shared, what is not, and what is forgotten first."""

from __future__ import annotations

import numpy as np
import pytest

from albireo.ipc.plan import (
    COPY_BLOCK,
    MAX_PLAN_SCORES,
    ROW_GRAMMAR_FAILED,
    ROW_NOT_FINITE,
    ROW_NOTHING_ALLOWED,
)
from albireo.scheduler.prefix_cache import PrefixCache, extend_names, root_name

from .fake_group import FakeGroup
from .groups import group, lengths, starts, step, taken
from .submissions import expected_end, submission, token_at


def caching(**limits: object) -> FakeGroup:
    return group(prefix_caching=True, **limits)


def names_of(tokens: list[int], salt: str = "", block_size: int = 2) -> list[bytes]:
    names = [root_name(salt)]
    extend_names(names, np.array(tokens, dtype=np.int32), block_size)
    return names


def test_a_name_stands_for_all_tokens_up_to_the_blocks_end() -> None:
    first = names_of([1, 2, 3, 4, 5])
    assert len(first) == 3
    assert names_of([1, 2, 3, 9])[1] == first[1]
    assert names_of([9, 2, 3, 4])[2] != first[2]
    assert set(names_of([1, 2, 3, 4], salt="s")).isdisjoint(first)
    grown = names_of([1, 2, 3])
    extend_names(grown, np.array([1, 2, 3, 4, 5], dtype=np.int32), 2)
    assert grown == first


def test_a_name_has_one_block_and_a_block_one_name() -> None:
    cache = PrefixCache(16)
    _, first, second = names = names_of([1, 2, 3, 4])
    cache.add([(first, 7), (first, 8)])
    cache.add([(second, 9)])
    assert cache.blocks(names) == [7, 9]
    assert (7 in cache, 8 in cache, len(cache)) == (True, False, 2)
    cache.drop([8])
    cache.drop([7, 3])
    assert cache.blocks(names) == []
    cache.add([(first, 8)])
    assert cache.blocks(names) == [8, 9]
    assert cache.named([9, 3, 8]) == ([9, 8], [3]) and cache.named([9]) == ([9], [])


def test_what_is_in_the_cache_is_not_computed_again() -> None:
    made = caching()
    made.submit(submission(1, prompt_len=11, max_tokens=1, seed=9001))
    made.run()
    made.submit(submission(2, prompt_len=12, max_tokens=3, seed=9002))
    plan = step(made)
    # 9 tokens are common: two blocks of 4.
    assert (starts(plan), lengths(plan)) == ([8], [4])
    assert plan.append[:, 1].tolist() == [0, 1, 2]
    made.run()
    made.check_streams()
    counters = made.scheduler.counters
    assert (counters.prefix_queried_tokens, counters.prefix_hit_tokens) == (23, 8)


@pytest.mark.parametrize("running", [True, False])
def test_of_a_prompt_that_is_there_only_the_last_token_is_computed(running: bool) -> None:
    made = caching()
    made.submit(submission(1, prompt_len=12, max_tokens=9, seed=5))
    if running:
        step(made)
    else:
        made.run()
    made.submit(submission(2, prompt_len=12, max_tokens=9, seed=5))
    plan = step(made)
    assert (taken(plan), starts(plan), lengths(plan)) == ([2], [11], [1])
    ((kind, source, target),) = plan.copy.tolist()
    assert kind == COPY_BLOCK
    tables = [state.table for state in made.worker.slots.values()]
    assert tables[-1][2] == target != source
    made.run()
    made.check_streams()


@pytest.mark.parametrize(
    ("why", "hits"), [(ROW_NOT_FINITE, 0), (ROW_NOTHING_ALLOWED, 8), (ROW_GRAMMAR_FAILED, 8)]
)
def test_only_a_row_that_is_not_finite_takes_its_blocks_from_the_others(
    why: int, hits: int
) -> None:
    """Nobody may empty the cache by asking for what cannot be sampled."""
    scheduler = caching().scheduler

    def hits_of(request: int, count: int, token: int) -> int:
        before = scheduler.counters.prefix_hit_tokens
        scheduler.submit(submission(request, prompt_len=11, max_tokens=1, seed=5))
        scheduler.apply(scheduler.plan().step, np.array([[request, count, token]], np.int32))
        return scheduler.counters.prefix_hit_tokens - before

    assert hits_of(1, 1, 7) == 0
    assert hits_of(2, 0, why) == 8
    assert hits_of(3, 1, 7) == hits


def test_a_prompt_that_fills_the_cache_alone_needs_no_second_copy_of_its_end() -> None:
    made = caching(num_blocks=3)
    for request in (1, 2):
        made.submit(submission(request, prompt_len=12, max_tokens=1, seed=5))
        made.run()
    assert made.scheduler.counters.prefix_hit_tokens == 8


def test_the_next_turn_of_a_conversation_finds_the_answer_to_the_last() -> None:
    made = caching()
    made.submit(submission(1, prompt_len=6, max_tokens=8, seed=5))
    made.run()
    # The last token of the answer has never been computed: 13 of 14 are there.
    made.submit(submission(2, prompt_len=20, max_tokens=2, seed=5))
    assert starts(step(made)) == [12]
    made.run()
    made.check_streams()


def test_the_token_after_a_stop_is_in_no_block_that_is_shared() -> None:
    made = caching()
    stop = token_at(5, 6)
    made.submit(submission(1, prompt_len=6, max_tokens=8, seed=5, stop_token_ids=(stop,)))
    made.run()
    made.submit(submission(2, prompt_len=20, max_tokens=2, seed=5))
    assert starts(step(made)) == [4]
    made.run()


def test_salt_divides_the_cache() -> None:
    made = caching()
    for request, salt in enumerate(("", "mine", "mine", ""), 1):
        made.submit(submission(request, prompt_len=9, max_tokens=1, seed=5, cache_salt=salt))
        assert starts(step(made)) == [0 if request < 3 else 8]
        made.run()


def test_twins_that_come_together_compute_their_prompt_once() -> None:
    made = caching(max_num_batched_tokens=8)
    for request in (1, 2, 3):
        made.submit(submission(request, prompt_len=14, max_tokens=3, seed=5))
    plans = [step(made) for _ in range(3)]
    assert [taken(plan) for plan in plans] == [[1], [], [2, 3]]
    assert [lengths(plan) for plan in plans] == [[8], [6], [2, 2]]
    made.run()
    made.check_streams()


def test_a_prefill_that_is_given_up_leaves_what_it_has_filled() -> None:
    made = caching(max_num_batched_tokens=10)
    made.submit(submission(1, prompt_len=30, max_tokens=3, seed=5))
    made.plan()
    made.abort(1)
    made.submit(submission(2, prompt_len=30, max_tokens=3, seed=5))
    plan = made.plan()
    assert plan is not None
    assert starts(plan) == [8]
    made.run()
    made.check_streams()


def test_what_was_used_last_is_forgotten_last_and_ends_before_starts() -> None:
    made = caching(num_blocks=6)
    for request, seed in ((1, 5), (2, 6)):
        made.submit(submission(request, prompt_len=8, max_tokens=1, seed=seed))
        made.run()
    made.submit(submission(3, prompt_len=9, max_tokens=1, seed=7))
    made.run()  # Takes two free blocks, and the end of 1.
    assert made.scheduler.pool.cached == 5
    made.submit(submission(4, prompt_len=7, max_tokens=1, seed=6))
    assert starts(step(made)) == [4]
    made.submit(submission(5, prompt_len=7, max_tokens=1, seed=5))
    assert starts(step(made)) == [4]
    made.submit(submission(6, prompt_len=5, max_tokens=1, seed=6))
    assert starts(step(made)) == [4]
    made.submit(submission(7, prompt_len=17, max_tokens=1, seed=8))
    made.run()  # Takes five of the six.
    made.submit(submission(8, prompt_len=5, max_tokens=1, seed=6))
    assert starts(step(made)) == [4]


def test_nobody_shares_what_a_failed_request_has_computed() -> None:
    made = caching()
    made.worker.poisoned.add(1)
    made.submit(submission(1, prompt_len=9, max_tokens=5, seed=5))
    made.run()
    assert made.streams[1].end == "failed"
    made.submit(submission(2, prompt_len=9, max_tokens=5, seed=5))
    assert starts(step(made)) == [0]
    made.run()


def test_penalties_see_the_tokens_that_are_skipped() -> None:
    made = caching()
    made.submit(submission(1, prompt_len=9, max_tokens=1, seed=5))
    made.run()
    made.submit(submission(2, prompt_len=9, max_tokens=4, seed=5, repetition_penalty=1.2))
    plan = step(made)
    assert plan.history[:, 1:].tolist() == [[0, 8]]
    assert plan.history_token.tolist() == made.streams[2].submit.prompt_ids[:8]
    made.run()


def test_prompt_logprobs_are_computed_for_the_whole_prompt_in_pieces() -> None:
    length = MAX_PLAN_SCORES + 40
    made = caching(max_model_len=512, num_blocks=256, max_num_batched_tokens=512)
    for request in (1, 2, 3):
        wanted = {"prompt_logprobs": 0} if request < 3 else {}
        made.submit(submission(request, length, max_tokens=2, seed=5, **wanted))
    plans = [step(made) for _ in range(3)]
    assert [len(plan.score) for plan in plans] == [128, 39 + 89, 78]
    made.run()
    made.check_streams()
    assert made.scheduler.counters.prefix_hit_tokens == length - length % 4 - 4 + 3


def test_a_resumed_answer_counts_with_its_tokens() -> None:
    made = caching()
    submit = submission(1, prompt_len=6, max_tokens=9, min_tokens=8, seed=5, resumed=5)
    refused = made.submit(submit)
    assert refused is None
    made.run()
    made.check_streams()
    assert len(made.streams[1].tokens) == 4
    assert expected_end(submit)[1] == made.streams[1].tokens
    refused = made.submit(submission(2, prompt_len=6, max_tokens=5, seed=5, resumed=5))
    assert refused is not None
    assert "5 tokens of max_tokens 5 are there already" in refused.message
