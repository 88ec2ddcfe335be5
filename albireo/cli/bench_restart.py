"""`albireo bench restart`."""

from __future__ import annotations

import json

import click

from albireo.bench.shapes import SHAPES
from albireo.node.options import DEVICES, DTYPES, NodeOptions, parse_groups

from .bench_parts import bench_errors, model_of, show_phases
from .ranges import range_of


@click.command()
@click.option("--shape", type=click.Choice(tuple(SHAPES)), help="Model with random weights.")
@click.option("--model", metavar="DIR|FILE.gguf|demo", help="A real one instead.  [default: demo]")
@click.option("--groups", default="1x1", show_default=True, metavar="1xT", help="Ranks.")
@click.option(
    "--streams", type=range_of("max_num_seqs"), default=8, show_default=True, help="In flight."
)
@click.option("--input-len", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
def restart(
    shape: str | None, model: str | None, groups: str, streams: int, input_len: int, rounds: int,
    device: str, dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """A worker is killed: seconds until its group is ready, and until its streams go on."""
    from albireo.bench.restart import bench_restart

    with bench_errors():
        options = NodeOptions(
            model=model_of(shape, model), groups=parse_groups(groups), device=device, dtype=dtype
        )
        result = bench_restart(shape, options, streams, input_len, rounds)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(f"{result['model']} on {result['device']}, {result['dtype']}, {streams} streams")
    found = zip(result["ready_s"], result["pause_s"], result["workers_phases_s"], strict=True)
    for ready_s, pause_s, workers in found:
        click.echo(f"ready again after {ready_s:.2f} s, streams go on after {pause_s:.2f} s")
        show_phases(workers)
