"""`albireo node start | status | stop | logs`."""

from __future__ import annotations

import sys
from typing import Any

import click

from albireo.ipc.paths import PathError, node_dir
from albireo.node.options import DEVICES, DTYPES, NodeOptions, OptionError, parse_groups

from .lazy import LazyGroup


@click.group(
    cls=LazyGroup,
    lazy={
        "start": ("albireo.cli.node:start", "Start a node in the foreground, or detached."),
        "status": ("albireo.cli.status:status", "Show what the node and its groups do."),
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
@click.option(
    "--model",
    default="demo",
    show_default=True,
    metavar="DIR|FILE.gguf|demo",
    help="Hugging Face directory, GGUF file, or the demo model.",
)
@click.option("--served-model-name", metavar="NAME", help="Name that clients see.")
@click.option("--tokenizer", metavar="DIR|FILE.gguf", help="Tokenizer, when not the model's own.")
@click.option(
    "--chat-template",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False),
    help="Jinja chat template, when not the model's own.",
)
@click.option(
    "--groups",
    default="1x1",
    show_default=True,
    metavar="GxT",
    help="G groups of T tensor-parallel ranks; also a mixture: 1x4,2x2.",
)
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option(
    "--load-format",
    type=click.Choice(("auto", "dummy")),
    default="auto",
    show_default=True,
    help="dummy = random weights from the config alone.",
)
@click.option("--max-model-len", type=click.IntRange(min=1), help="Longest prompt + answer.")
@click.option(
    "--max-num-seqs",
    type=click.IntRange(1, 4096),
    default=256,
    show_default=True,
    help="Most sequences running at once in a group.",
)
@click.option(
    "--max-num-batched-tokens", type=click.IntRange(min=1), help="Most tokens of one step."
)
@click.option(
    "--max-num-queued-reqs",
    type=click.IntRange(min=0),
    default=1024,
    show_default=True,
    help="Most requests waiting for each group.",
)
@click.option(
    "--block-size",
    type=click.Choice(("16",)),
    default="16",
    show_default=True,
    help="Tokens in a KV block.",
)
@click.option(
    "--kv-cache-gib",
    type=click.FloatRange(min=0, min_open=True),
    help="KV cache of each group, in GiB.",
)
@click.option(
    "--gpu-memory-utilization",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.9,
    show_default=True,
    help="Share of a GPU's free memory that its worker may take.",
)
@click.option(
    "--cuda-graphs/--no-cuda-graphs",
    " /--enforce-eager",
    "cuda_graphs",
    default=True,
    show_default=True,
    help="Capture the decode step on a GPU.",
)
@click.option(
    "--async-scheduling/--no-async-scheduling",
    default=True,
    show_default=True,
    help="Plan one step ahead of the running one.",
)
@click.option(
    "--batch-invariant",
    is_flag=True,
    help="A row's numbers do not depend on the batch around it (slower).",
)
@click.option("--threads", type=click.IntRange(1, 512), help="Threads of each worker.")
@click.option(
    "--step-timeout",
    type=click.FloatRange(min=0.1),
    default=30.0,
    show_default=True,
    help="Seconds after which a step counts as hung.",
)
@click.option(
    "--shutdown-timeout",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    help="Seconds that requests in flight get when the node stops.",
)
@click.option(
    "--sim-step-ms",
    type=click.FloatRange(min=0.01),
    default=10.0,
    show_default=True,
    help="Step time of the sim device.",
)
@click.option(
    "--log-level",
    type=click.Choice(("debug", "info", "warning", "error")),
    default="info",
    show_default=True,
)
@click.option("--detach", is_flag=True, help="Return when the node is ready; it runs on.")
@name_option
def start(detach: bool, **given: Any) -> None:
    """Start a node: router, tokenizer, and the groups' processes.

    Without options it serves the demo model with one group on the best device
    there is.
    """
    from albireo.node.launch import run_detached, run_foreground

    from .display import StartDisplay

    try:
        options = _options(given)
    except (OptionError, PathError) as error:
        raise click.ClickException(str(error)) from None
    display = StartDisplay(options)
    sys.exit((run_detached if detach else run_foreground)(options, display.show))


def _options(given: dict[str, Any]) -> NodeOptions:
    node_dir(given["name"])
    template = given.pop("chat_template")
    if template is not None:
        with open(template, encoding="utf-8") as file:
            template = file.read()
    return NodeOptions(
        groups=parse_groups(given.pop("groups")),
        step_timeout_s=given.pop("step_timeout"),
        shutdown_timeout_s=given.pop("shutdown_timeout"),
        block_size=int(given.pop("block_size")),
        chat_template=template,
        **given,
    )


@click.command()
@name_option
@click.option("--now", is_flag=True, help="Do not wait for requests in flight.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
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
