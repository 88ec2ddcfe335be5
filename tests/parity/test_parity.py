"""Greedy tokens of a node equal transformers', on the demo model in float32.

`make parity` runs all of it: 50 prompts x 64 tokens for 1x1, 1x3 and 2x1, with
asynchronous scheduling on and off, all prompts in flight at once and one by
one, and again batch-invariant, where all runs of a TP degree have to agree.
A short version belongs to the tests that always run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from .greedy import Answers, Judge, ask

PROMPTS = (Path(__file__).parent.parent / "data" / "prompts.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def judge(reference: PreTrainedModel) -> Judge:
    return Judge(reference)


@pytest.fixture(scope="module")
def invariant_answers() -> dict[int, Answers]:
    """The first batch-invariant answers of each TP degree."""
    return {}


@pytest.mark.demo
@pytest.mark.node
@pytest.mark.timeout(300)
@pytest.mark.parametrize("groups", [(1,), (3,)])
def test_a_few_tokens(
    start_node: Callable[..., str], judge: Judge, groups: tuple[int, ...]
) -> None:
    node = start_node(name="p", device="cpu", dtype="float32", groups=groups)
    prompts, at_once, one_by_one = ask(node, PROMPTS[::12], tokens=16)
    for answers in (at_once, one_by_one):
        verdict = judge.judge(prompts, answers)
        assert not verdict.wrong
        assert verdict.tokens == 16 * len(prompts)


@pytest.mark.parity
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("invariant", [False, True], ids=["plain", "invariant"])
@pytest.mark.parametrize("ahead", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("groups", [(1,), (3,), (1, 1)], ids=["1x1", "1x3", "2x1"])
def test_fifty_prompts(
    start_node: Callable[..., str],
    judge: Judge,
    invariant_answers: dict[int, Answers],
    groups: tuple[int, ...],
    ahead: bool,
    invariant: bool,
) -> None:
    node = start_node(
        name="p", device="cpu", dtype="float32", groups=groups, async_scheduling=ahead,
        batch_invariant=invariant,
    )  # fmt: skip
    prompts, at_once, one_by_one = ask(node, PROMPTS, tokens=64)
    for label, answers in (("at once", at_once), ("one by one", one_by_one)):
        verdict = judge.judge(prompts, answers)
        print(
            f"{label}: {verdict.tokens} tokens, {len(verdict.wrong)} wrong, {verdict.close} close"
        )
        assert not verdict.wrong
    if invariant:
        assert at_once == one_by_one
        assert at_once == invariant_answers.setdefault(groups[0], at_once)
