"""`albireo node restart-group | drain-group | start-group`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from .amounts import Amount
from .node import name_option

_ALL = -1


def _group(context: click.Context, parameter: click.Parameter, value: str) -> int:
    if value == "all":
        return _ALL
    if not value.isdecimal():
        raise click.BadParameter(f"{value!r} is neither a group's number nor `all`")
    return int(value)


_group_argument = click.argument("group", metavar="GROUP|all", callback=_group)


def _timeout_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--timeout",
        type=Amount(min=0),
        default=10.0,
        show_default=True,
        help="Seconds that requests in flight get; then they go on in another group.",
    )(function)


@click.command()
@_group_argument
@_timeout_option
@name_option
def restart_group(group: int, timeout: float, name: str) -> None:
    """Start a group anew, or all of them one after the other.

    It gets no new requests, and those in flight have some time to finish; what
    is left goes on in another group, or in this one when it is back. No request
    is lost.
    """
    _give(name, "restart", group, timeout)


@click.command()
@_group_argument
@_timeout_option
@name_option
def drain_group(group: int, timeout: float, name: str) -> None:
    """Let a group finish its requests, then stop it and free its memory."""
    _give(name, "drain", group, timeout)


@click.command()
@_group_argument
@name_option
def start_group(group: int, name: str) -> None:
    """Start a group that was stopped, was given up, or waits before it tries again.

    Of all groups, those that do not run.
    """
    _give(name, "start", group, 0.0)


def _give(name: str, action: str, group: int, timeout_s: float) -> None:
    from albireo.ipc.paths import PathError
    from albireo.node.operations import Order, give_order
    from albireo.node.options import OptionError

    try:
        for text in give_order(name, Order(action=action, group=group, timeout_s=timeout_s)):
            click.echo(text)
    except (OptionError, PathError) as error:
        raise click.ClickException(str(error)) from None
