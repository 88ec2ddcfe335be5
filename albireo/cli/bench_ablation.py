"""`albireo bench ablation`."""

from __future__ import annotations

import json

import click
from rich.console import Console

from albireo.bench.shapes import SHAPES
from albireo.node.options import DEVICES, DTYPES, NodeOptions, parse_groups

from .amounts import Amount
from .bench_parts import bench_errors, model_of
from .ranges import range_of


@click.command()
@click.option("--shape", type=click.Choice(tuple(SHAPES)), help="Model with random weights.")
@click.option("--model", metavar="DIR|FILE.gguf|demo", help="A real one instead.  [default: demo]")
@click.option("--groups", default="1x1", show_default=True, metavar="1xT", help="Ranks.")
@click.option("--batch", type=range_of("max_num_seqs"), default=128, show_default=True)
@click.option("--input-len", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--output-len", type=click.IntRange(min=16), default=256, show_default=True)
@click.option("--sampling", type=click.Choice(("greedy", "full")), default="full",
              show_default=True)  # fmt: skip
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--threads", type=range_of("threads"), help="Threads of each worker.")
@click.option("--sim-step-ms", type=Amount(min=0.01), default=5.0, show_default=True,
              help="Step time of the sim device.")  # fmt: skip
@click.option(
    "--setting",
    "settings",
    multiple=True,
    metavar="NAME",
    help="Only this one, such as 'all on' or --no-async-output; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")  # fmt: skip
def ablation(
    shape: str | None, model: str | None, groups: str, batch: int, input_len: int,
    output_len: int, sampling: str, device: str, dtype: str, threads: int | None,
    sim_step_ms: float, settings: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Step time, and what the device waits for, with each part of the runtime switched off."""
    from albireo.bench.ablation import SETTINGS, bench_ablation

    console = Console(stderr=True, highlight=False)
    with bench_errors():
        options = NodeOptions(
            model=model_of(shape, model), groups=parse_groups(groups), device=device, dtype=dtype,
            threads=threads, sim_step_ms=sim_step_ms,
        )  # fmt: skip
        with console.status("") as line:
            result = bench_ablation(
                shape, options, batch, input_len, output_len, sampling, settings,
                lambda name: line.update(f"{name} ({list(SETTINGS).index(name) + 1} of "
                                         f"{len(SETTINGS)})"),
            )  # fmt: skip
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(
        f"{result['model']} on {result['device']}, {result['dtype']}, {batch} streams, {sampling}"
    )
    columns = ("step ms", "forward ms", "T1 us", "T2 us", "T4 us", "T5 us", "rest us", "idle us",
               "serial")  # fmt: skip
    click.echo(f"{'':24}" + "".join(f"{column:>11}" for column in columns))
    for row in result["results"]:
        times = (*row["exposed_us"].values(), row["idle_us"])
        click.echo(
            f"{row['setting']:24}{row['step_ms']:11,.3f}{row['forward_ms']:11,.3f}"
            + "".join(f"{value:11,.1f}" for value in times)
            + f"{row['serial_fraction']:11.2%}"
        )
