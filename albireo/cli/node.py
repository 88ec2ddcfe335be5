"""`albireo node ...`: the group of its commands, the option they share, and `stop`."""

from __future__ import annotations

import click

from albireo.ipc.paths import PathError
from albireo.node.options import OptionError

from .amounts import Amount
from .lazy import LazyGroup


@click.group(
    cls=LazyGroup,
    lazy={
        "start": ("albireo.cli.start:start", "Start a node in the foreground, or detached."),
        "status": ("albireo.cli.status:status", "Show what the node and its groups do."),
        "restart-group": (
            "albireo.cli.operations:restart_group",
            "Start a group anew, or all in turn; its requests go on elsewhere.",
        ),
        "drain-group": (
            "albireo.cli.operations:drain_group",
            "Let a group finish its requests, and stop it.",
        ),
        "start-group": (
            "albireo.cli.operations:start_group",
            "Start a group that was stopped or given up.",
        ),
        "stop": ("albireo.cli.node:stop", "Stop a node: requests in flight finish first."),
        "logs": ("albireo.cli.logs:logs", "Show the log of a node."),
    },
)
def node() -> None:
    """Start, watch and stop a node."""


name_option = click.option(
    "--name", default="default", show_default=True, help="The node's name.", metavar="NAME"
)


@click.command()
@name_option
@click.option("--now", is_flag=True, help="Do not wait for requests in flight.")
@click.option(
    "--timeout",
    type=Amount(min=0),
    default=60.0,
    show_default=True,
    help="Seconds to wait for the end of the node.",
)
def stop(name: str, now: bool, timeout: float) -> None:
    """Stop a node: requests in flight finish first."""
    from albireo.node.launch import stop_node

    try:
        stop_node(name, now=now, timeout_s=timeout)
    except (OptionError, PathError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"node {name} has stopped")
