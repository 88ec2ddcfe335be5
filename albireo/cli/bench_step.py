"""`albireo bench step`."""

from __future__ import annotations

import json
import math

import click

from albireo.bench.shapes import SHAPES
from albireo.node.options import DTYPES, NodeOptions, parse_groups

from .bench_parts import bench_errors, format_options, sizes_of

_HIDDEN = ("tiny",)


@click.command()
@click.option(
    "--shape",
    type=click.Choice(tuple(SHAPES)),
    default="qwen3-0.6b",
    show_default=True,
    metavar="|".join(name for name in SHAPES if name not in _HIDDEN),
    help="Model whose shape runs, with random weights.",
)
@click.option("--groups", default="1x1", show_default=True, metavar="1xT", help="Ranks.")
@click.option(
    "--batch", default="1,64,128,256", show_default=True, metavar="B,B,...", help="Streams at once."
)
@click.option("--input-len", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--output-len", type=click.IntRange(min=16), default=128, show_default=True)
@click.option(
    "--sampling", type=click.Choice(("greedy", "full")), default="greedy", show_default=True
)
@click.option(
    "--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True
)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--async-scheduling/--no-async-scheduling", default=True, show_default=True)
@click.option("--cuda-graphs/--no-cuda-graphs", default=True, show_default=True)
@format_options
@click.option(
    "--client-polls/--client-sleeps",
    default=True,
    show_default=True,
    help="The client waits for tokens awake, where a core is left for it.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Of each batch; their steps are taken together.",
)
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
def step(
    shape: str, groups: str, batch: str, input_len: int, output_len: int, sampling: str,
    device: str, dtype: str, async_scheduling: bool, cuda_graphs: bool,
    e4m7_weights: str, kv_cache_dtype: str, client_polls: bool, rounds: int, as_json: bool,
) -> None:  # fmt: skip
    """A decode step, every token delivered to a client, against the memory's floor."""
    from albireo.bench.step import bench_step

    with bench_errors():
        options = NodeOptions(
            groups=parse_groups(groups), device=device, dtype=dtype,
            async_scheduling=async_scheduling, cuda_graphs=cuda_graphs, e4m7_weights=e4m7_weights,
            kv_cache_dtype=kv_cache_dtype,
        )  # fmt: skip
        result = bench_step(
            shape, options, sizes_of(batch), input_len, output_len, sampling, client_polls,
            rounds,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(
        f"{result['shape']} on {result['device']}, {result['dtype']}, {sampling}; ready in "
        f"{result['ready_s']} s; a copy moves {result['copy_gb_per_s']:,} GB/s"
    )
    click.echo("batch   median ms   P99 ms   undisturbed   device's   floor ms   ratio")
    for row in result["results"]:
        click.echo(
            f"{row['batch']:5}  {row['step_ms_median']:10.3f}  {row['step_ms_p99']:7.3f}  "
            f"{row['step_ms_p99_undisturbed'] or math.nan:12.3f}  "
            f"{row['device_ms_p99'] or math.nan:9.3f}  "
            f"{row['floor_ms']:9.3f}  {row['ratio']:6.2f}"
        )
    for left_out in result["no_room"]:
        click.echo(f"{left_out['batch']:5}  no room: {left_out['reason']}")
