"""`albireo bench latency | throughput`: whole batches, without HTTP and its clients."""

from __future__ import annotations

import json
from typing import Any

import click

from albireo.node.options import NodeOptions, parse_groups

from .bench_parts import (
    bench_errors,
    dataset_of,
    dataset_options,
    model_options,
    node_options,
    show_table,
    sizes_of,
)

_COUNT = click.IntRange(min=1)
_NODE = (
    "model", "async_scheduling", "device", "dtype", "load_format", "max_model_len",
    "max_num_seqs", "batch_invariant",
)  # fmt: skip


@click.command()
@node_options
@model_options
@click.option("--batch-size", type=_COUNT, default=8, show_default=True, help="Requests at once.")
@click.option("--input-len", type=_COUNT, default=32, show_default=True)
@click.option("--output-len", type=_COUNT, default=128, show_default=True)
@click.option("--num-iters-warmup", type=click.IntRange(min=0), default=3, show_default=True)
@click.option("--num-iters", type=_COUNT, default=10, show_default=True)
def latency(**given: Any) -> None:
    """Time from a batch's submission to its last token, repeated."""
    from albireo.bench.batches import bench_latency

    with bench_errors():
        result = bench_latency(
            _node(given), given["batch_size"], given["input_len"], given["output_len"],
            given["num_iters_warmup"], given["num_iters"],
        )  # fmt: skip
    if given["as_json"]:
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(
        f"{result['batch_size']} x {result['input_len']} + {result['output_len']} tokens of "
        f"{result['model']}: {result['avg_latency']:.3f} s on average of "
        f"{len(result['latencies'])}, {result['tokens_per_s']:,.1f} new tokens/s"
    )
    found = result["percentiles"]
    show_table(
        tuple(f"P{each}, s" for each in found), [tuple(f"{each:.3f}" for each in found.values())]
    )


@click.command()
@node_options
@model_options
@click.option(
    "--batch", default="1,8,32", show_default=True, metavar="B,B,...", help="Requests at once."
)
@click.option("--input-len", type=_COUNT, default=32, show_default=True)
@click.option("--output-len", type=_COUNT, default=64, show_default=True)
@click.option("--repeats", type=_COUNT, default=3, show_default=True)
@click.option("--num-prompts", type=_COUNT, help="In place of batches: so many of a data set.")
@dataset_options
def throughput(**given: Any) -> None:
    """New tokens a second, prefill included: of batches, or of a data set, all of it at once."""
    from albireo.bench.batches import bench_batches, bench_dataset

    with bench_errors():
        if given["num_prompts"] is not None:
            result = bench_dataset(_node(given), dataset_of(given))
        else:
            result = bench_batches(
                _node(given), sizes_of(given["batch"]), given["input_len"], given["output_len"],
                given["repeats"],
            )  # fmt: skip
    if given["as_json"]:
        click.echo(json.dumps(result, indent=2))
    elif given["num_prompts"] is not None:
        click.echo(
            f"{result['num_requests']:,} requests, {result['total_input_tokens']:,} tokens in, "
            f"{result['total_output_tokens']:,} out, in {result['elapsed_time']:,.2f} s: "
            f"{result['requests_per_second']:,.2f} requests/s, "
            f"{result['output_tokens_per_second']:,.1f} new tokens/s, "
            f"{result['tokens_per_second']:,.1f} in all"
        )
    else:
        names = ("tokens_per_s", "tokens_per_s_min", "tokens_per_s_max")
        show_table(
            ("batch", "tokens/s", "min", "max"),
            [
                (str(row["batch"]), *(f"{row[name]:,.1f}" for name in names))
                for row in result["results"]
            ],
        )


def _node(given: dict[str, Any]) -> NodeOptions:
    """Raises OptionError."""
    return NodeOptions(
        groups=parse_groups(given["groups"]), **{name: given[name] for name in _NODE}
    )
