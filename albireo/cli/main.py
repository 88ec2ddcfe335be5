"""The root of the command line."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from .lazy import LazyGroup

_STDOUT = 1


class _Root(LazyGroup):
    """Says what is wrong when standard output takes no more, whichever command writes to it."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            if error.filename is not None or _takes_a_byte(_STDOUT):
                raise
            click.echo(f"Error: standard output: {error.strerror}", err=True)
            sys.exit(1)


def _takes_a_byte(fd: int) -> bool:
    try:
        return os.write(fd, b"\n") == 1
    except OSError:
        return False


@click.group(
    cls=_Root,
    lazy={
        "node": ("albireo.cli.node:node", "Start, watch and stop a node."),
        "generate": ("albireo.cli.ask:generate", "Continue a text."),
        "chat": ("albireo.cli.ask:chat", "Talk with the model."),
        "top": ("albireo.cli.top:top", "Watch a node live, in the terminal."),
        "trace": ("albireo.cli.trace:trace", "Draw what every process does, step by step."),
        "simulate": ("albireo.cli.simulate:simulate", "Try a workload on virtual time."),
        "profile": ("albireo.cli.profile:profile", "Fit step times for simulate to measured ones."),
        "bench": ("albireo.cli.bench:bench", "Measure."),
    },
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="albireo", prog_name="albireo")
def main() -> None:
    """Albireo serves large language models on one node."""
