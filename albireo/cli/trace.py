"""`albireo trace`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from albireo.ipc.paths import PathError, node_dir
from albireo.node.runtime_dir import is_running

from .amounts import Amount
from .files import require_directory
from .node import name_option


@click.command()
@name_option
@click.option("--steps", type=click.IntRange(min=1), default=300, show_default=True)
@click.option(
    "--last", is_flag=True, help="The newest steps there are, instead of waiting for new ones."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("trace.html"),
    show_default=True,
    help=".html: a page to look at. .json: for Perfetto and Chrome.",
)
@click.option(
    "--timeout",
    type=Amount(min=0),
    default=60.0,
    show_default=True,
    help="Seconds to wait for the steps.",
)
def trace(name: str, steps: int, last: bool, output: Path, timeout: float) -> None:
    """Draw what every process and device of a node does, step by step.

    The node records it always; this only reads.  Steps come when requests do.
    """
    from albireo.trace.capture import CaptureError, capture
    from albireo.trace.chrome import chrome_trace
    from albireo.trace.page import html_page

    if output.suffix not in (".html", ".json"):
        raise click.ClickException(f"-o {output}: the name must end in .html or .json")
    require_directory(output)
    console = Console(stderr=True, highlight=False)
    try:
        if not is_running(name):
            raise click.ClickException(f"no node named {name!r} is running")
        with console.status("") as line:
            stretch = capture(
                node_dir(name), steps, last=last, timeout_s=timeout,
                seen=lambda count: line.update(f"{count} of {steps} steps"),
            )  # fmt: skip
        text = html_page(stretch) if output.suffix == ".html" else json.dumps(chrome_trace(stretch))
        output.write_text(text, "utf-8")
    except (CaptureError, PathError, OSError) as error:
        raise click.ClickException(str(error)) from None
    for group, stats in stretch.stats.items():
        console.print(
            f"group {group}: {stats.steps} steps of {stats.step_us_mean / 1000:.3f} ms · serial "
            f"fraction {stats.serial_fraction:.2%} · device idle {stats.idle_us_mean:.1f} us "
            "a step",
            soft_wrap=True,
        )
    click.echo(str(output))
