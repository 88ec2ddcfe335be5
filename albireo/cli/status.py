"""`albireo node status`."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from albireo.client import AlbireoError, Client, NodeNotRunning
from albireo.node.runtime_dir import is_running, read_facts

from .node import name_option


@click.command()
@name_option
@click.option("--json", "as_json", is_flag=True, help="The whole tree, for programs.")
def status(name: str, as_json: bool) -> None:
    """Show what the node and its groups do."""
    try:
        with Client.connect(node=name) as client:
            tree = client.status()
    except NodeNotRunning as error:
        raise click.ClickException(_starting(name) or str(error)) from None
    except AlbireoError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps(tree, indent=2))
        return
    console = Console(highlight=False)
    _show_node(console, tree)
    console.print(_groups(tree["groups"]))
    console.print(_stages(tree["groups"]))
    console.print(_actors(tree["actors"]))


def _starting(name: str) -> str | None:
    """What there is to say of a node that nobody can reach yet."""
    facts = read_facts(name)
    if facts is None or facts["state"] == "ready" or not is_running(name):
        return None
    return f"node {name!r} (pid {facts['pid']}) is starting: wait for its ready line"


def _show_node(console: Console, tree: dict[str, Any]) -> None:
    model, requests = tree["model"], tree["requests"]
    console.print(
        f"[bold]node {tree['node']}[/bold] · {model['id']} ({model['parameters'] / 1e6:.0f} M "
        f"parameters, {model['dtype']} on {model['device']}) · up {tree['uptime_s']:.0f} s"
        + (" · [yellow]draining[/yellow]" if tree["draining"] else ""),
        soft_wrap=True,
    )
    console.print(
        f"requests: {requests['in_flight']} in flight, {requests['finished']} finished, "
        f"{requests['cancelled']} cancelled, {requests['failed']} failed · "
        f"{tree['connections']} connection(s)",
        soft_wrap=True,
    )


def _groups(groups: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    columns = "group state running waiting KV steps prompt new requests ms/step"
    for column in columns.split():
        table.add_column(column, justify="left" if column in ("group", "state") else "right")
    for group in groups:
        stats = group["scheduler"]
        cells = ["-"] * 8
        if stats is not None:
            cells = [
                str(stats["running"]),
                str(stats["waiting"]),
                f"{stats['kv_usage']:.1%}",
                f"{stats['steps']:,}",
                f"{stats['prompt_tokens']:,}",
                f"{stats['generated_tokens']:,}",
                f"{stats['requests_finished']:,}",
                f"{stats['step_ms_mean']:.2f}",
            ]
        table.add_row(str(group["group"]), _coloured(group["state"]), *cells)
    return table


def _stages(groups: list[dict[str, Any]]) -> Table:
    """Of the last steps, in us: the step, the device's idle time in it, and what each task takes
    and what the device waits for it; and the serial fraction."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("group", "serial", "us", "step", "idle", "T1", "T2", "T3", "T4", "T5"):
        table.add_column(column, justify="left" if column in ("group", "us") else "right")
    for group in groups:
        stages = group["stages"]
        if stages is None:
            table.add_row(str(group["group"]), *"-" * 9)
            continue
        tasks = [stages[task] for task in ("schedule", "input", "forward", "sample", "output")]
        serial = f"{stages['serial_fraction']:.2%}"
        for label, whole, field in (
            ("mean", ["step_us_mean", "idle_us_mean"], "mean_us"),
            ("P99", ["step_us_p99", "idle_us_p99"], "p99_us"),
            ("exposed", [], "exposed_us"),
        ):
            times = [stages[name] for name in whole] or [None, None]
            times += [task[field] for task in tasks]
            head = (str(group["group"]), serial) if label == "mean" else ("", "")
            cells = ("" if time is None else f"{time:,.1f}" for time in times)
            table.add_row(*head, label, *cells)
    return table


def _actors(actors: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("actor", "state", "pid", "threads", "restarts"):
        table.add_column(column, justify="left" if column in ("actor", "state") else "right")
    for actor in actors:
        table.add_row(
            actor["name"],
            _coloured(actor["state"]),
            str(actor["pid"]),
            str(actor["threads"]),
            str(actor["restarts"]),
        )
    return table


def _coloured(state: str) -> str:
    colour = {"ready": "green", "failed": "red", "dead": "red"}.get(state, "yellow")
    return f"[{colour}]{state}[/{colour}]"
