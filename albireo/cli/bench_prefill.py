"""`albireo bench prefill`."""

from __future__ import annotations

import json

import click

from albireo.bench.shapes import SHAPES
from albireo.node.options import DTYPES, NodeOptions, parse_groups

from .bench_parts import bench_errors, format_options


@click.command()
@click.option(
    "--shape", type=click.Choice(tuple(SHAPES)), default="qwen3-0.6b", show_default=True,
    metavar="NAME", help="Model whose shape runs, with random weights (see bench step).",
)  # fmt: skip
@click.option("--groups", default="1x1", show_default=True, metavar="1xT", help="Ranks.")
@click.option(
    "--prompts", default="4x2048,1x8192", show_default=True, metavar="NxLEN,...",
    help="Prompts at once, and tokens of each.",
)  # fmt: skip
@click.option(
    "--mixed", default="64x512", show_default=True, metavar="NxLEN",
    help="Streams that decode, and tokens of a prompt that comes between.",
)  # fmt: skip
@click.option(
    "--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True
)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--cuda-graphs/--no-cuda-graphs", default=True, show_default=True)
@format_options
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
def prefill(
    shape: str, groups: str, prompts: str, mixed: str, device: str, dtype: str,
    cuda_graphs: bool, e4m7_weights: str, kv_cache_dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """Prompts, alone and between decodes, against the cost of the matrix products."""
    from albireo.bench.prefill import bench_prefill

    with bench_errors():
        options = NodeOptions(
            groups=parse_groups(groups),
            device=device,
            dtype=dtype,
            cuda_graphs=cuda_graphs,
            e4m7_weights=e4m7_weights,
            kv_cache_dtype=kv_cache_dtype,
        )
        cases = [_pair(part) for part in prompts.split(",")]
        result = bench_prefill(shape, options, cases, _pair(mixed))
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(
        f"{result['shape']} on {result['device']}, {result['dtype']}; products run at "
        f"{result['product_tflop_per_s']:,} TFLOP/s"
    )
    click.echo("prompts  tokens        ms   tokens/s  floor tokens/s  ratio")
    for row in result["prompts"]:
        click.echo(
            f"{row['prompts']:7}  {row['tokens']:6}  {row['ms']:8.2f}  {row['tokens_per_s']:9,}  "
            f"{row['floor_tokens_per_s']:14,}  {row['ratio']:5.2f}"
        )
    row = result["mixed"]
    click.echo(
        f"{row['decodes']} decodes with a prompt of {row['prompt_tokens']}: "
        f"{row['mixed_step_ms']:.2f} ms; apart {row['decode_step_ms']:.2f} + "
        f"{row['prompt_alone_ms']:.2f} ms: {row['mixed_over_sum']:.2f} of the sum"
    )


def _pair(text: str) -> tuple[int, int]:
    count, _, length = text.partition("x")
    if not (count.isdecimal() and length.isdecimal() and int(count) and int(length)):
        raise ValueError(f"{text!r} is not NxLEN, such as 4x2048")
    return int(count), int(length)
