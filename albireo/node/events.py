"""What the supervisor says while it works, for whoever shows it: a display, a log, a pipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec


class PhaseBegun(msgspec.Struct, frozen=True, tag=True):
    """A phase of the start has begun; the one before it is over."""

    text: str


class NodeReady(msgspec.Struct, frozen=True, tag=True):
    """Clients can connect.  `facts` is what node.json says too."""

    seconds: float
    facts: dict[str, Any]


class NodeNote(msgspec.Struct, frozen=True, tag=True):
    """Something the user should see: a group died, a group is back, the node drains."""

    text: str


class NodeFailed(msgspec.Struct, frozen=True, tag=True):
    """The node could not start, or cannot go on."""

    reason: str


class NodeStopped(msgspec.Struct, frozen=True, tag=True):
    pass


Event = PhaseBegun | NodeReady | NodeNote | NodeFailed | NodeStopped


def in_words(phases_s: Mapping[str, float]) -> str:
    """ "loading the weights 3.1 s, warming up 0.4 s"; those of less than 50 ms are left out."""
    return ", ".join(f"{text} {taken:.1f} s" for text, taken in phases_s.items() if taken >= 0.05)
