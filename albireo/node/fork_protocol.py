"""Messages between the supervisor and the fork server, on a SOCK_SEQPACKET pair."""

from __future__ import annotations

import msgspec

from albireo.ipc.actor import Fatal, Phase
from albireo.ipc.config import ActorSpec, ModelInfo

MAX_MESSAGE_BYTES = 1 << 17
MAX_FDS = 32


class Load(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """What to have in memory before anything is forked."""

    model_path: str
    model_name: str
    tokenizer_path: str
    chat_template: str | None
    device: str
    dtype: str
    load_format: str
    tp_degrees: tuple[int, ...]
    batch_invariant: bool
    gateways: int
    sampling_defaults: str = "model"


class Loaded(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Everything is in memory; device and dtype are the resolved ones."""

    model: ModelInfo
    device: str
    dtype: str


class Fork(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Start an actor; `fd_names` names the descriptors that come along, in order."""

    spec: ActorSpec
    fd_names: tuple[str, ...]


class ForkUnderstudy(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Fork a second fork server, everything in memory; the descriptor that comes along is its
    control socket."""


class Forked(msgspec.Struct, frozen=True, tag=True, array_like=True):
    name: str
    pid: int


class NotForked(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """There was no room for one more process; the fork server serves on."""

    name: str
    reason: str


encode = msgspec.msgpack.Encoder().encode
to_fork_server: msgspec.msgpack.Decoder[Load | Fork | ForkUnderstudy] = msgspec.msgpack.Decoder(
    Load | Fork | ForkUnderstudy
)
from_fork_server: msgspec.msgpack.Decoder[Phase | Fatal | Loaded | Forked | NotForked] = (
    msgspec.msgpack.Decoder(Phase | Fatal | Loaded | Forked | NotForked)
)
