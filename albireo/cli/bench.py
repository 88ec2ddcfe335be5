"""`albireo bench runtime | throughput | step | flood | prefill | prefix | sampling | ablation`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from albireo.node.options import DTYPES, NodeOptions, OptionError, parse_groups

from .bench_ablation import ablation
from .bench_flood import flood
from .bench_gateway import gateway
from .bench_prefill import prefill
from .bench_prefix import prefix
from .bench_sampling import sampling
from .bench_serve import serve
from .bench_step import step


@click.group()
def bench() -> None:
    """Measure, with a node started for the purpose."""


bench.add_command(serve)
bench.add_command(step)
bench.add_command(sampling)
bench.add_command(gateway)
bench.add_command(flood)
bench.add_command(prefill)
bench.add_command(prefix)
bench.add_command(ablation)


def _node_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        [
            click.option("--model", default="demo", show_default=True,
                         metavar="DIR|FILE.gguf|demo"),
            click.option("--groups", default="1x1", show_default=True, metavar="GxT"),
            click.option("--async-scheduling/--no-async-scheduling", default=True,
                         show_default=True),
            click.option("--json", "as_json", is_flag=True, help="The result as JSON."),
        ]
    ):  # fmt: skip
        function = option(function)
    return function


@bench.command()
@_node_options
@click.option("--device", type=click.Choice(("sim",)), default="sim", show_default=True)
@click.option(
    "--batch",
    type=click.IntRange(1, 4096),
    default=256,
    show_default=True,
    help="Streams of the client.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=8),
    default=1000,
    show_default=True,
    help="Tokens of each stream.",
)
@click.option("--step-ms", type=click.FloatRange(min=0.01), default=5.0, show_default=True)
def runtime(
    model: str, groups: str, async_scheduling: bool, as_json: bool, device: str, batch: int,
    tokens: int, step_ms: float,
) -> None:  # fmt: skip
    """Tokens a second through the whole path around the model, each of them checked."""
    from albireo.bench.runtime import bench_runtime

    def measure() -> dict[str, Any]:
        options = NodeOptions(
            model=model, groups=parse_groups(groups), async_scheduling=async_scheduling,
            device=device, sim_step_ms=step_ms,
        )  # fmt: skip
        return bench_runtime(options, batch, tokens)

    result = _measured(measure)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(
        f"{result['tokens_per_s']:,} tokens/s to one client · {result['ms_per_step']:.2f} ms a "
        f"step of {step_ms:g} ms · {result['tokens_checked']:,} tokens checked"
    )
    _show(
        ("actor", "CPU ms a step", "share of a core"),
        [
            (name, f"{cpu_ms:.3f}", f"{result['cpu_share_of_a_core'][name]:.1%}")
            for name, cpu_ms in result["cpu_ms_per_step"].items()
        ],
    )


@bench.command()
@_node_options
@click.option(
    "--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True
)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option(
    "--batch", default="1,8,32", show_default=True, metavar="B,B,...", help="Requests at once."
)
@click.option("--input-len", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--output-len", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--load-format", type=click.Choice(("auto", "dummy")), default="auto")
@click.option("--batch-invariant", is_flag=True)
def throughput(
    model: str, groups: str, async_scheduling: bool, as_json: bool, device: str, dtype: str,
    batch: str, input_len: int, output_len: int, repeats: int, load_format: str,
    batch_invariant: bool,
) -> None:  # fmt: skip
    """New tokens a second of whole batches, prefill included."""
    from albireo.bench.throughput import bench_throughput

    def measure() -> dict[str, Any]:
        options = NodeOptions(
            model=model, groups=parse_groups(groups), async_scheduling=async_scheduling,
            device=device, dtype=dtype, load_format=load_format, batch_invariant=batch_invariant,
        )  # fmt: skip
        batches = [int(part) for part in batch.split(",")]
        return bench_throughput(options, batches, input_len, output_len, repeats)

    result = _measured(measure)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    _show(
        ("batch", "tokens/s", "min", "max"),
        [
            (
                str(row["batch"]),
                f"{row['tokens_per_s']:,.1f}",
                f"{row['tokens_per_s_min']:,.1f}",
                f"{row['tokens_per_s_max']:,.1f}",
            )
            for row in result["results"]
        ],
    )


def _show(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, header_style="dim")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


def _measured(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Runs a measurement; what goes wrong becomes the command's error."""
    from albireo.bench.nodes import BenchError
    from albireo.client import AlbireoError

    try:
        return measure()
    except (BenchError, AlbireoError, OptionError, ValueError) as error:
        raise click.ClickException(str(error)) from None
