"""`albireo node logs`."""

from __future__ import annotations

import collections
import os
import time
from pathlib import Path

import click

from albireo.ipc.paths import log_path

from .node import name_option


@click.command()
@name_option
@click.option(
    "--lines",
    "-n",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    help="How many of the last lines.",
)
@click.option("--follow", "-f", is_flag=True, help="Go on showing what is added.")
def logs(name: str, lines: int, follow: bool) -> None:
    """Show the log of a node, running or not."""
    path = Path(log_path(name))
    if not path.exists():
        raise click.ClickException(f"there is no log of a node named {name!r} ({path})")
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in collections.deque(file, maxlen=lines):
            click.echo(line, nl=False)
        while follow:
            text = file.read()
            if text:
                click.echo(text, nl=False)
                continue
            now = os.fstat(file.fileno())
            if not now.st_nlink:
                return  # it went with its node, see node/launch.py
            if now.st_size < file.tell():
                file.seek(0)  # it was emptied, see node/log_file.py
            time.sleep(0.1)
