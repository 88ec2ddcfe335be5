"""The node as the supervisor sees it, for the router: every process and every group."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence

from albireo.ipc.messages import ActorInfo, Topology

from .children import ActorProcess, Watched
from .group import Group

HELPERS = ("forkserver", "understudy", "janitor")
NUM_OWN = 1 + len(HELPERS)
"""The supervisor and its helpers: processes that are no actors."""


def topology(
    actors: Iterable[ActorProcess],
    groups: Sequence[Group],
    helpers: Sequence[Watched],
    restarts: Counter[str],
) -> Topology:
    """actors: all of them.  helpers: as HELPERS names them.  restarts: of helpers, by name."""
    own = [_own("supervisor", os.getpid(), True, 0)]
    for name, helper in zip(HELPERS, helpers, strict=True):
        own.append(_own(name, helper.pid, helper.alive, restarts[name]))
    return Topology(
        actors=[*own, *map(_actor, actors)],
        groups=[group.state for group in groups],
        incarnations=[group.incarnation for group in groups],
        num_blocks=[group.engine.num_blocks for group in groups],
    )


def _own(name: str, pid: int, alive: bool, restarts: int) -> ActorInfo:
    return ActorInfo(name, name, -1, pid, "ready" if alive else "dead", restarts, 1)


def _actor(actor: ActorProcess) -> ActorInfo:
    spec = actor.spec
    state = "ready" if actor.ready.done() else "starting"
    return ActorInfo(
        spec.name, spec.role, spec.group, actor.pid, state if actor.alive else "dead",
        spec.incarnation, spec.threads,
    )  # fmt: skip
