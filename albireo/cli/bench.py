"""`albireo bench`: its commands, and `albireo bench runtime`."""

from __future__ import annotations

import json

import click

from albireo.node.options import NodeOptions, parse_groups

from .amounts import Amount
from .bench_ablation import ablation
from .bench_batches import latency, throughput
from .bench_flood import flood
from .bench_gateway import gateway
from .bench_parts import bench_errors, node_options, show_table
from .bench_prefill import prefill
from .bench_prefix import prefix
from .bench_restart import restart
from .bench_sampling import sampling
from .bench_serve import serve
from .bench_start import start
from .bench_step import step
from .ranges import range_of


@click.group()
def bench() -> None:
    """Measure: a server (serve), or a node started for the purpose."""


bench.add_command(serve)
bench.add_command(latency)
bench.add_command(throughput)
bench.add_command(step)
bench.add_command(sampling)
bench.add_command(gateway)
bench.add_command(flood)
bench.add_command(prefill)
bench.add_command(prefix)
bench.add_command(restart)
bench.add_command(start)
bench.add_command(ablation)


@bench.command()
@node_options
@click.option("--device", type=click.Choice(("sim",)), default="sim", show_default=True)
@click.option(
    "--batch",
    type=range_of("max_num_seqs"),
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
@click.option("--step-ms", type=Amount(min=0.01), default=5.0, show_default=True)
@click.option(
    "--journal",
    metavar="DIR",
    type=click.Path(file_okay=False, resolve_path=True),
    help="The same with requests and tokens logged there.",
)
def runtime(
    model: str, groups: str, async_scheduling: bool, as_json: bool, device: str, batch: int,
    tokens: int, step_ms: float, journal: str | None,
) -> None:  # fmt: skip
    """Tokens a second through the whole path around the model, each of them checked."""
    from albireo.bench.runtime import bench_runtime

    with bench_errors():
        options = NodeOptions(
            model=model, groups=parse_groups(groups), async_scheduling=async_scheduling,
            device=device, sim_step_ms=step_ms, journal=journal,
        )  # fmt: skip
        result = bench_runtime(options, batch, tokens)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(
        f"{result['tokens_per_s']:,} tokens/s to one client · {result['ms_per_step']:.2f} ms a "
        f"step of {step_ms:g} ms · {result['tokens_checked']:,} tokens checked"
    )
    show_table(
        ("actor", "CPU ms a step", "share of a core"),
        [
            (name, f"{cpu_ms:.3f}", f"{result['cpu_share_of_a_core'][name]:.1%}")
            for name, cpu_ms in result["cpu_ms_per_step"].items()
        ],
    )
