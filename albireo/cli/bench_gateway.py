"""`albireo bench gateway`."""

from __future__ import annotations

import json

import click

from albireo.node.options import NodeOptions, parse_groups

from .amounts import Amount
from .bench_parts import bench_errors
from .ranges import range_of


@click.command()
@click.option("--model", default="demo", show_default=True, metavar="DIR|FILE.gguf|demo")
@click.option("--groups", default="1x1", show_default=True, metavar="GxT")
@click.option("--gateways", type=range_of("gateways"), default=1, show_default=True)
@click.option(
    "--streams",
    type=range_of("max_num_seqs"),
    default=256,
    show_default=True,
    help="HTTP clients, each with one stream.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=8),
    default=400,
    show_default=True,
    help="Tokens of each stream.",
)
@click.option("--step-ms", type=Amount(min=0.01), default=20.0, show_default=True)
@click.option("--chat/--completions", default=True, show_default=True, help="The endpoint.")
@click.option("--uds", is_flag=True, help="Over a Unix socket instead of TCP.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
def gateway(
    model: str, groups: str, gateways: int, streams: int, tokens: int, step_ms: float, chat: bool,
    uds: bool, as_json: bool,
) -> None:  # fmt: skip
    """CPU time that a streamed event costs the HTTP gateway, under many streams."""
    from albireo.bench.gateway import bench_gateway

    with bench_errors():
        options = NodeOptions(
            model=model, groups=parse_groups(groups), gateways=gateways, sim_step_ms=step_ms
        )
        result = bench_gateway(options, streams, tokens, chat=chat, uds=uds)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(
        f"{result['events_per_s']:,} events/s to {streams} clients over {result['transport']} · "
        f"gateway {result['gateway_us_per_event']:.1f} us of CPU an event, clients "
        f"{result['client_us_per_event']:.1f} us"
    )
    click.echo(
        f"ITL median {result['itl_ms_median']:.2f} ms, P99 {result['itl_ms_p99']:.2f} ms at steps "
        f"of {step_ms:g} ms · TTFT median {result['ttft_ms_median']:.1f} ms"
    )
    for name, share in result["cpu_share_of_a_core"].items():
        click.echo(f"  {name:18} {share:6.1%} of a core")
