"""`albireo bench prefix`."""

from __future__ import annotations

import json

import click

from albireo.node.options import DTYPES, NodeOptions, parse_groups

from .amounts import Amount
from .bench_parts import bench_errors


@click.command()
@click.option("--model", default="demo", show_default=True, metavar="DIR|FILE.gguf|demo")
@click.option("--groups", default="1x1", show_default=True, metavar="GxT")
@click.option("--input-len", type=click.IntRange(min=64), default=1024, show_default=True)
@click.option(
    "--shared",
    type=Amount(min=0, max=1),
    default=0.9,
    show_default=True,
    help="Share of a prompt that is common to all.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True)
@click.option(
    "--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True
)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
def prefix(
    model: str, groups: str, input_len: int, shared: float, rounds: int, device: str, dtype: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Time to the first token of prompts that share a prefix, against others."""
    from albireo.bench.prefix import bench_prefix

    with bench_errors():
        options = NodeOptions(model=model, groups=parse_groups(groups), device=device, dtype=dtype)
        result = bench_prefix(options, input_len, shared, rounds)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(
        f"{result['model']} on {result['device']}, {result['dtype']}: prompts of {input_len} "
        f"tokens, {result['shared_len']} of them common\n"
        f"TTFT {result['ttft_ms_apart']:.1f} ms without a common prefix, "
        f"{result['ttft_ms_shared']:.1f} ms with it: {result['times_lower']:.1f} times lower "
        f"({result['hit_tokens_per_prompt']:.0f} tokens found for each prompt)"
    )
