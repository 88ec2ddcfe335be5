"""Groups for tests of the policy, and what their plans say."""

from __future__ import annotations

from typing import Any

from albireo.ipc.plan import TAKE_REQUEST, TAKE_START, PlanView
from albireo.scheduler.limits import Limits

from .fake_group import FakeGroup


def group(**limits: Any) -> FakeGroup:
    """Small budgets, without a prefix cache, unless given."""
    budgets: dict[str, Any] = {
        "max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 64, "block_size": 4,
        "num_blocks": 64, "lookahead": 1, "prefix_caching": False,
    }  # fmt: skip
    return FakeGroup(Limits(**(budgets | limits)))


def step(group: FakeGroup) -> PlanView:
    """One plan that has to be there, with its result."""
    plan = group.plan()
    assert plan is not None
    group.finish_step()
    return plan


def taken(plan: PlanView) -> list[int]:
    """Requests that get a slot."""
    return plan.take[:, TAKE_REQUEST].tolist()


def starts(plan: PlanView) -> list[int]:
    """Their tokens that need not be computed."""
    return plan.take[:, TAKE_START].tolist()


def lengths(plan: PlanView) -> list[int]:
    """Lengths of the chunks."""
    return plan.chunk[:, 2].tolist()
