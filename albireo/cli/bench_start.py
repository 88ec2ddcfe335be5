"""`albireo bench start`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from albireo.bench.shapes import SHAPES
from albireo.node.options import DEVICES, DTYPES, NodeOptions, parse_groups

from .bench_parts import bench_errors, format_options, show_phases

_WEIGHTS = ("checkpoint", "dummy")


@click.command()
@click.option(
    "--shape", type=click.Choice(tuple(SHAPES)), default="qwen3-0.6b", show_default=True,
    help="Model with random weights.",
)  # fmt: skip
@click.option(
    "--weights", type=click.Choice(_WEIGHTS), default="checkpoint", show_default=True,
    help="Written as files first, or made by the node itself.",
)  # fmt: skip
@click.option(
    "--dir", "directory", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the files are meanwhile.  [default: with temporary files]",
)  # fmt: skip
@click.option("--groups", default="1x1", show_default=True, metavar="GxT", help="Ranks.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@format_options
@click.option("--rounds", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
def start(
    shape: str, weights: str, directory: Path | None, groups: str, device: str, dtype: str,
    e4m7_weights: str, kv_cache_dtype: str, rounds: int, as_json: bool,
) -> None:  # fmt: skip
    """How long a node takes until it serves, phase by phase."""
    from albireo.bench.start import bench_start
    from albireo.node.events import in_words

    with bench_errors():
        options = NodeOptions(
            groups=parse_groups(groups), device=device, dtype=dtype, e4m7_weights=e4m7_weights,
            kv_cache_dtype=kv_cache_dtype,
        )  # fmt: skip
        result = bench_start(shape, options, weights, directory, rounds)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    weights = f"a checkpoint of {result['checkpoint_gb']:g} GB"
    click.echo(
        f"{result['shape']} on {result['device']}, {result['dtype']}, "
        f"{weights if result['weights'] == 'checkpoint' else 'random weights'}; room for "
        f"{min(result['kv_tokens']):,} tokens a group"
    )
    for each in result["rounds"]:
        click.echo(f"ready after {each['ready_s']:.2f} s: {in_words(each['phases_s'])}")
        show_phases(each["workers_phases_s"])
