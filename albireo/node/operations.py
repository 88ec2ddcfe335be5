"""What an operator may ask of the groups of a running node, and the socket for it.

node.sock in the runtime directory (0600): one JSON object with what to do,
then lines of JSON back: Notes, and at last Done or Failed.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from albireo.ipc.paths import CONTROL_SOCKET, node_dir, require_socket_path

from .group import Group
from .options import OptionError

_MAX_ORDER_BYTES = 1 << 16
_ORDER_TIMEOUT_S = 10.0
_POLL_S = 0.02
_ALL = -1
ACTIONS = ("restart", "drain", "start")
_THERE = {"drain": "stopped", "start": "ready"}
"""The state after an action: of all groups, those that have it are passed over."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """action: one of ACTIONS.  group: a number; -1 = all, one after the other.

    timeout_s: that requests in flight get before they go on elsewhere.
    """

    action: str
    group: int
    timeout_s: float


class Note(msgspec.Struct, frozen=True, tag=True):
    """What happens."""

    text: str


class Done(msgspec.Struct, frozen=True, tag=True):
    """It has happened."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """It cannot; the text is for the user."""

    reason: str


Answer = Note | Done | Failed
_order_decoder = msgspec.json.Decoder(Order)
_answer_decoder: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)

Say = Callable[[str], None]


class OperationError(Exception):
    """The order cannot be carried out; the text is for the user."""


class Operations:
    """drain(timeout_s, group) returns when the group serves nobody, or the time is over."""

    def __init__(
        self,
        groups: Sequence[Group],
        drain: Callable[[float, int], Awaitable[None]],
        note: Say,
    ) -> None:
        self._groups = groups
        self._drain = drain
        self._note = note
        self._turn = asyncio.Lock()

    async def carry_out(self, order: Order, say: Say) -> None:
        """One at a time.  Raises OperationError."""
        chosen = self._choose(order)
        async with self._turn:
            for group in chosen:
                if order.group == _ALL and group.state == _THERE.get(order.action):
                    say(f"group {group.number} is {group.state} already")
                    continue
                self._note(f"group {group.number}: {order.action} on request")
                if order.action == "start":
                    await self._start(group, say)
                else:
                    await self._leave(group, order, say)

    def _choose(self, order: Order) -> list[Group]:
        if order.action not in ACTIONS:
            raise OperationError(f"{order.action!r} is none of {', '.join(ACTIONS)}")
        if order.group == _ALL:
            return list(self._groups)
        if not 0 <= order.group < len(self._groups):
            raise OperationError(
                f"there is no group {order.group}: the node has 0 to {len(self._groups) - 1}"
            )
        return [self._groups[order.group]]

    async def _leave(self, group: Group, order: Order, say: Say) -> None:
        if group.state == "stopped" and order.action == "restart":
            await self._start(group, say)
            return
        if group.state != "ready":
            raise OperationError(
                f"group {group.number} is {group.state}, not ready: it cannot be asked to "
                f"{order.action}; {_what_to_do(group)}"
            )
        say(f"group {group.number}: requests in flight have {order.timeout_s:g} s")
        come_back = order.action == "restart"
        incarnation = group.incarnation
        group.drain(come_back)
        await self._drain(order.timeout_s, group.number)
        if group.incarnation == incarnation or not come_back:  # else it died, and is back by itself
            group.leave(come_back)
        if come_back:
            await _until(lambda: group.incarnation > incarnation and group.state == "ready", group)
            say(f"group {group.number} is ready")
        else:
            await _until(lambda: group.state == "stopped", group)
            say(f"group {group.number} has stopped")

    async def _start(self, group: Group, say: Say) -> None:
        if group.state in ("ready", "draining"):
            raise OperationError(f"group {group.number} runs already")
        # Somebody waits for it: where it dies again, its next try does not.
        await _until(lambda: group.state == "ready", group, tried=False, meanwhile=group.start)
        say(f"group {group.number} is ready")


def _what_to_do(group: Group) -> str:
    """With one that is not ready."""
    if group.state in ("stopped", "failed"):
        return f"it is started by `albireo node start-group {group.number}`"
    return "try again when it is (`albireo node status`)"


async def _until(
    happened: Callable[[], bool], group: Group, tried: bool = True,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Waits; raises OperationError when the group is given up.

    tried: False = it may have been given up before, and counts as tried when it no longer is.
    meanwhile: done again and again.
    """
    while not happened():
        tried |= group.state != "failed"
        if tried and group.state == "failed":
            raise OperationError(f"group {group.number} has failed: {group.reason}")
        meanwhile()
        await asyncio.sleep(_POLL_S)


async def serve_control(runtime_dir: Path, operations: Operations) -> None:
    """Serves the socket until it is cancelled."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def tell(answer: Answer) -> None:
            writer.write(msgspec.json.encode(answer) + b"\n")

        try:
            order = await _read_order(reader)
            await operations.carry_out(order, lambda text: tell(Note(text)))
            tell(Done())
        except OperationError as error:
            tell(Failed(str(error)))
        writer.close()

    path = str(runtime_dir / CONTROL_SOCKET)
    require_socket_path(path)
    server = await asyncio.start_unix_server(serve, path, limit=_MAX_ORDER_BYTES)
    os.chmod(path, 0o600)
    async with server:
        await server.serve_forever()


async def _read_order(reader: asyncio.StreamReader) -> Order:
    """Raises OperationError for what is none, or does not come."""
    try:
        async with asyncio.timeout(_ORDER_TIMEOUT_S):
            line = await reader.readline()
        return _order_decoder.decode(line)
    except TimeoutError:
        raise OperationError(f"no order came within {_ORDER_TIMEOUT_S:g} s") from None
    except (ValueError, RecursionError, OSError) as error:
        raise OperationError(f"that is no order: {str(error)[:200]}") from None


def give_order(name: str, order: Order) -> Iterator[str]:
    """Has the node of that name carry out an order; yields what happens.

    Raises OptionError when there is no such node, or it cannot.
    """
    path = str(Path(node_dir(name)) / CONTROL_SOCKET)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        try:
            link.connect(path)
        except OSError:
            raise OptionError(f"no node named {name!r} is running") from None
        link.sendall(msgspec.json.encode(order) + b"\n")
        with link.makefile("rb") as lines:
            for line in lines:
                match _answer_decoder.decode(line):
                    case Note(text):
                        yield text
                    case Failed(reason):
                        raise OptionError(reason)
                    case Done():
                        return
    raise OptionError(f"node {name!r} has ended before it was done")
