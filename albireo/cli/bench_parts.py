"""What several of the bench commands have in common: options, errors, tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from albireo.node.options import (
    DTYPES,
    E4M7_WEIGHTS,
    KV_CACHE_DTYPES,
    LOAD_FORMATS,
    MOST_SEQS,
    OptionError,
)

from .amounts import Amount
from .ranges import range_of
from .several import with_options

if TYPE_CHECKING:
    from albireo.bench.serving import DatasetOptions

_DATASETS = ("random", "sharegpt", "custom", "prefix_repetition")
_COUNT = click.IntRange(min=1)

format_options = with_options(
    click.option(
        "--e4m7-weights", type=click.Choice(E4M7_WEIGHTS), default="auto", show_default=True
    ),
    click.option(
        "--kv-cache-dtype", type=click.Choice(KV_CACHE_DTYPES), default="auto", show_default=True
    ),
)
"""Of weights and KV cache on a GPU."""

node_options = with_options(
    click.option("--model", default="demo", show_default=True, metavar="DIR|FILE.gguf|demo"),
    click.option("--groups", default="1x1", show_default=True, metavar="GxT"),
    click.option("--async-scheduling/--no-async-scheduling", default=True, show_default=True),
    click.option("--json", "as_json", is_flag=True, help="The result as JSON."),
)

model_options = with_options(
    click.option(
        "--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True
    ),
    click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True),
    click.option("--load-format", type=click.Choice(LOAD_FORMATS), default="auto"),
    click.option(
        "--max-model-len", type=range_of("max_model_len"), help="Longest prompt + answer."
    ),
    click.option("--max-num-seqs", type=range_of("max_num_seqs"), default=256, show_default=True),
    click.option("--batch-invariant", is_flag=True),
)
"""Of a node that is started for its speed with a model."""

dataset_options = with_options(
    click.option("--dataset-name", type=click.Choice(_DATASETS), default="random",
                 show_default=True),
    click.option("--dataset-path", type=click.Path(dir_okay=False, path_type=Path),
                 help="ShareGPT's JSON; custom: lines of JSON."),
    click.option("--random-input-len", type=_COUNT, default=1024, show_default=True),
    click.option("--random-output-len", type=_COUNT, default=128, show_default=True),
    click.option("--random-range-ratio", type=Amount(min=0, max=1, max_open=True), default=0.0,
                 show_default=True, help="By what share of them lengths differ."),
    click.option("--random-prefix-len", type=click.IntRange(min=0), default=0, show_default=True,
                 help="Common to all."),
    click.option("--prefix-repetition-prefix-len", type=_COUNT, default=256, show_default=True),
    click.option("--prefix-repetition-suffix-len", type=_COUNT, default=256, show_default=True),
    click.option("--prefix-repetition-num-prefixes", type=_COUNT, default=10, show_default=True),
    click.option("--prefix-repetition-output-len", type=_COUNT, default=128, show_default=True),
    click.option("--sharegpt-output-len", type=_COUNT, help="[default: as the file's answers]"),
    click.option("--custom-output-len", type=_COUNT, default=256, show_default=True,
                 help="Of lines that do not say."),
    click.option("--seed", type=int, default=0, show_default=True,
                 help="A prefix cache may know the prompts of a seed that was used before."),
)  # fmt: skip


def model_of(shape: str | None, model: str | None) -> str:
    """That of --model, where there is no --shape.  Raises OptionError."""
    if shape is not None and model is not None:
        raise OptionError("--shape and --model both name a model: give one of them")
    return model or "demo"


def sizes_of(batch: str) -> list[int]:
    """Of --batch B,B,...  Raises OptionError."""
    parts = batch.split(",")
    if not all(part.strip().isdecimal() and 1 <= int(part) <= MOST_SEQS for part in parts):
        raise OptionError(f"--batch {batch!r}: give sizes of 1 to {MOST_SEQS}, such as 1,8,32")
    return [int(part) for part in parts]


def dataset_of(given: dict[str, Any], **more: Any) -> DatasetOptions:
    """The data set that these options name; `more` are fields of it."""
    from albireo.bench.serving import DatasetOptions

    name = given["dataset_name"]
    return DatasetOptions(
        name=name,
        num_prompts=given["num_prompts"],
        seed=given["seed"],
        input_len=given["random_input_len"],
        output_len=given["random_output_len"],
        range_ratio=given["random_range_ratio"],
        prefix_len=given["random_prefix_len"],
        repeated_prefix_len=given["prefix_repetition_prefix_len"],
        repeated_suffix_len=given["prefix_repetition_suffix_len"],
        num_prefixes=given["prefix_repetition_num_prefixes"],
        repeated_output_len=given["prefix_repetition_output_len"],
        path=given["dataset_path"],
        text_output_len=given[f"{name}_output_len"] if name in ("sharegpt", "custom") else None,
        **more,
    )


def show_phases(workers: Mapping[str, Mapping[str, float]]) -> None:
    """A line for each worker whose start took some time, with what it took it for, in seconds."""
    from albireo.node.events import in_words

    for name, phases_s in workers.items():
        if words := in_words(phases_s):
            click.echo(f"  {name}: {words}")


def show_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, header_style="dim")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


@contextlib.contextmanager
def bench_errors() -> Iterator[None]:
    """What goes wrong in a measurement becomes the command's error."""
    from albireo.bench.nodes import BenchError
    from albireo.client import AlbireoError

    try:
        yield
    except (BenchError, AlbireoError, OptionError, ValueError) as error:
        raise click.ClickException(str(error)) from None
