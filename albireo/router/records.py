"""The records that a journal is made of."""

from __future__ import annotations

import msgspec

from albireo._version import __version__
from albireo.ipc.config import ActorSpec
from albireo.ipc.messages import Submit


class _Record(msgspec.Struct, frozen=True, array_like=True, tag=True):
    pass


class Opened(_Record, frozen=True):
    """First of a segment: whose requests these are.  Others cannot go on with them."""

    software: str
    model: str
    parameters: int
    vocab_size: int
    max_model_len: int


class Accepted(msgspec.Struct, array_like=True, tag=True):
    """A request with what it has so far; the router's own record of it, too.

    number: of its first answer; the others have the next ones.  0 = it is in no journal.
    owner: digest of the session's name.  client_id: the client's number for it.
    tenant: that the client named; "" = none.
    submit: as for choice 0, without a number.
    tokens: of each answer, by choice.
    """

    number: int
    owner: bytes
    client_id: int
    tenant: str
    submit: Submit
    tokens: dict[int, list[int]]


class Step(_Record, frozen=True):
    """tokens: (number of the answer, index of the first, ids).  ended: answers.  gone: requests
    that were given up, or go on under another number or without one."""

    tokens: list[tuple[int, int, list[int]]]
    ended: list[int]
    gone: list[int]


class Continued(_Record, frozen=True):
    """Last of a segment: the next one has more."""


Record = Opened | Accepted | Step | Continued


def opened_by(spec: ActorSpec) -> Opened:
    model = spec.model
    return Opened(
        __version__, model.name, model.num_params, model.vocab_size, spec.engine.max_model_len
    )
