"""`albireo bench sampling`."""

from __future__ import annotations

import json
from typing import Any

import click

from albireo.node.options import parse_groups

from .bench_parts import bench_errors, show_table, sizes_of


@click.command()
@click.option("--vocab", type=click.IntRange(min=4), default=151_936, show_default=True)
@click.option(
    "--batch", default="64,128,256", show_default=True, metavar="B,B,...", help="Rows of a step."
)
@click.option(
    "--groups",
    default="1x1",
    show_default=True,
    metavar="1xT",
    help="One group of T ranks, which share the vocabulary.",
)
@click.option(
    "--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True
)
@click.option(
    "--dtype",
    type=click.Choice(("float32", "bfloat16")),
    default="float32",
    show_default=True,
    help="Of the logits.",
)
@click.option(
    "--demo-logits",
    is_flag=True,
    help="Also the rows that leave `vocab` on logits of the demo model, on the CPU.",
)
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
def sampling(
    vocab: int, batch: str, groups: str, device: str, dtype: str, demo_logits: bool, as_json: bool
) -> None:
    """The time from a step's logits to its tokens, by kind of request and, on several GPUs, mode.

    `full` has the three penalties, of sequences of 384 tokens.  Left by vocab: rows that
    its candidates do not decide, and that are sampled whole.
    """
    from albireo.bench.nodes import BenchError
    from albireo.bench.sampling import bench_sampling

    with bench_errors():
        ranks = parse_groups(groups)
        if len(ranks) != 1:
            raise BenchError(f"--groups {groups}: one group is measured at a time, 1x{ranks[0]}")
        result = bench_sampling(device, vocab, sizes_of(batch), ranks[0], dtype)
        if demo_logits:
            from albireo.bench.demo_logits import demo_left

            result["demo_logits"] = demo_left(max(2, ranks[0]))
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(f"{result.get('gpu', result['device'])}, {ranks[0]} rank(s), {vocab} tokens")
    columns: tuple[str, ...] = ("batch", "requests", "us", "us P99")
    if ranks[0] > 1 and result["device"] == "cuda":
        columns = (*columns, "mode", "left by vocab")
    show_table(columns, [_cells(row) for row in result["results"]])
    if demo_logits:
        demo = result["demo_logits"]
        left = ", ".join(f"{kind} {share:.2%}" for kind, share in demo["left"].items())
        click.echo(f"of {demo['rows']} rows of the demo model, {demo['ranks']} ranks: {left}")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    cells = (str(row["batch"]), row["kind"], f"{row['us']:,.1f}", f"{row['us_p99']:,.1f}")
    return (*cells, row["mode"], f"{row['left']:.1%}") if "mode" in row else cells
