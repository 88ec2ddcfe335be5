"""`albireo bench flood`."""

from __future__ import annotations

import json

import click

from albireo.node.options import NodeOptions, parse_groups

from .amounts import Amount
from .bench_parts import bench_errors


@click.command()
@click.option("--model", default="demo", show_default=True, metavar="DIR|FILE.gguf|demo",
              help="For its tokenizer and shape alone.")  # fmt: skip
@click.option("--groups", default="1x1", show_default=True, metavar="GxT")
@click.option("--step-ms", type=Amount(min=0.01), default=20.0, show_default=True)
@click.option("--requests", type=click.IntRange(min=1), default=1000, show_default=True,
              help="Of the flood, sent at once by one client.")  # fmt: skip
@click.option("--output-len", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--samples", type=click.IntRange(min=1), default=8, show_default=True,
              help="Requests of the other client, before and beside the flood.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
def flood(
    model: str, groups: str, step_ms: float, requests: int, output_len: int, samples: int,
    as_json: bool,
) -> None:  # fmt: skip
    """TTFT of a client that sends one request a second while another sends a thousand."""
    from albireo.bench.flood import bench_flood

    with bench_errors():
        options = NodeOptions(model=model, groups=parse_groups(groups), sim_step_ms=step_ms)
        result = bench_flood(options, requests, output_len, samples)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(
        f"steps of {step_ms:g} ms; {requests} requests of 64 + {output_len} tokens at once, "
        f"{result['left_of_the_flood']} of them left at the end\n"
        f"TTFT alone {result['ttft_ms_quiet']} ms\n"
        f"beside the flood {result['ttft_ms_beside_the_flood']} ms: "
        f"{result['times_longer_median']} times (median), {result['times_longer_worst']} (worst)"
    )
