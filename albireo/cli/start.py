"""`albireo node start`: its options, and what they say as NodeOptions."""

from __future__ import annotations

import sys
from typing import Any

import click

from albireo.ipc.paths import PathError, node_dir
from albireo.node.options import (
    DEVICES,
    DTYPES,
    E4M7_WEIGHTS,
    KV_CACHE_DTYPES,
    LOAD_FORMATS,
    LOG_LEVELS,
    SAMPLING_DEFAULTS,
    SAMPLING_MODES,
    NodeOptions,
    OptionError,
    parse_groups,
    parse_weights,
)

from .files import text_of
from .network_options import http_address, names_in, network_options
from .node import name_option
from .ranges import range_of


def _chunks_are_always(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if not value:
        raise click.UsageError(
            "--no-enable-chunked-prefill: prompts that do not fit a step are always computed in "
            "chunks. With --max-num-batched-tokens no less than --max-model-len every prompt fits"
        )


@click.command()
@click.option(
    "--model",
    default="demo",
    show_default=True,
    metavar="DIR|FILE.gguf|demo",
    help="Hugging Face directory, GGUF file, or the demo model.",
)
@click.option("--served-model-name", metavar="NAME", help="Name that clients see.")
@click.option("--tokenizer", metavar="DIR|FILE.gguf", help="Tokenizer, when not the model's own.")
@click.option(
    "--chat-template",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False),
    help="Jinja chat template, when not the model's own.",
)
@click.option(
    "--groups",
    default="1x1",
    show_default=True,
    metavar="GxT",
    help="G groups of T tensor-parallel ranks; also a mixture: 1x4,2x2.",
)
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option(
    "--load-format",
    type=click.Choice(LOAD_FORMATS),
    default="auto",
    show_default=True,
    help="dummy = random weights from a config.json alone; where there is no tokenizer beside it, "
    "of bytes.",
)
@click.option(
    "--max-model-len",
    type=range_of("max_model_len"),
    help="Longest prompt + answer.  [default: the model's context]",
)
@click.option(
    "--max-num-seqs",
    type=range_of("max_num_seqs"),
    default=256,
    show_default=True,
    help="Most sequences running at once in a group.",
)
@click.option(
    "--max-num-batched-tokens",
    type=range_of("max_num_batched_tokens"),
    help="Most tokens of one step.  [default: 512 on the CPU, else 2048; or "
    "--max-num-seqs, where that is more]",
)
@click.option(
    "--max-num-queued-reqs",
    type=range_of("max_num_queued_reqs"),
    default=1024,
    show_default=True,
    help="Most requests waiting for each group; of clients with few in flight an eighth more.",
)
@click.option(
    "--max-num-reqs-per-tenant",
    type=range_of("max_num_reqs_per_tenant"),
    default=0,
    show_default=True,
    help="Most requests in flight of one client or API key; 0 = no limit.",
)
@click.option(
    "--tenant-weights",
    default="",
    metavar="TENANT=W,...",
    help="Shares of clients or API keys, by name, when there is not enough for all; else 1.",
)
@click.option(
    "--isolate-tenants",
    is_flag=True,
    help="Share cached prefixes only within one client or API key, so that none can probe another.",
)
@click.option(
    "--max-num-tokens-per-tenant",
    type=range_of("max_num_tokens_per_tenant"),
    default=0,
    show_default=True,
    help="Most tokens, of prompts and max_tokens, in flight of one; 0 = no limit.",
)
@click.option(
    "--max-failovers",
    type=range_of("max_failovers"),
    default=3,
    show_default=True,
    help="Times that a request goes on elsewhere when its group dies.",
)
@click.option(
    "--journal",
    metavar="DIR",
    type=click.Path(file_okay=False, resolve_path=True),
    help="Log requests and tokens there: they go on after the router's death.",
)
@click.option(
    "--journal-max-mib",
    type=range_of("journal_max_mib"),
    default=256,
    show_default=True,
    help="Most that the log takes on the disk.",
)
@click.option(
    "--journal-fsync",
    type=range_of("journal_fsync_s"),
    default=0.0,
    show_default=True,
    help="Seconds after which the disk has the log; 0 = when the kernel likes.",
)
@click.option(
    "--resume-grace",
    type=range_of("resume_grace_s"),
    help="Seconds that requests wait for a client that lost its connection. "
    "[default: 10 with --journal, else 0]",
)
@click.option(
    "--block-size",
    type=click.Choice(("16",)),
    default="16",
    show_default=True,
    help="Tokens in a KV block.",
)
@click.option(
    "--kv-cache-gib",
    type=range_of("kv_cache_gib"),
    help="KV cache of each group, in GiB.  [default: what a GPU has left; on the CPU at "
    "most 4, and of free memory a quarter for all groups]",
)
@click.option(
    "--gpu-memory-utilization",
    type=range_of("gpu_memory_utilization"),
    default=0.9,
    show_default=True,
    help="Share of a GPU's free memory that its worker may take; of no use to the KV cache with "
    "--kv-cache-gib.",
)
@click.option(
    "--enable-prefix-caching/--no-enable-prefix-caching",
    default=True,
    show_default=True,
    help="Share the KV blocks of common prefixes.",
)
@click.option(
    "--enable-chunked-prefill/--no-enable-chunked-prefill",
    default=True,
    show_default=True,
    expose_value=False,
    callback=_chunks_are_always,
    help="Compute prompts in chunks beside the decodes: always so.",
)
@click.option(
    "--swap-space",
    type=range_of("swap_space_gib"),
    default=0.0,
    show_default=True,
    help="Host memory of each group for preempted sequences, in GiB.",
)
@click.option(
    "--itl-target-ms",
    type=range_of("itl_target_ms"),
    default=0.0,
    show_default=True,
    help="Size prefill chunks so that a step stays below it; 0 = no target.",
)
@click.option(
    "--mixed-step-tokens",
    type=range_of("mixed_step_tokens"),
    help="What a step that computes prompts beside few decodes, an eighth of this at most, is "
    "filled to, more where much waits; 0 = as any step. Of no use with --itl-target-ms.  "
    "[default: 512 or more on a GPU, else 0]",
)
@click.option(
    "--cuda-graphs/--no-cuda-graphs",
    " /--enforce-eager",
    "cuda_graphs",
    default=True,
    show_default=True,
    help="Capture steps on a GPU: those of decodes, and forward passes with prefill chunks.",
)
@click.option(
    "--async-scheduling/--no-async-scheduling",
    default=True,
    show_default=True,
    help="Plan ahead of the running step.",
)
@click.option(
    "--async-output/--no-async-output",
    default=True,
    show_default=True,
    help="Make text of one step while the next one runs.",
)
@click.option(
    "--sampling-defaults",
    type=click.Choice(SAMPLING_DEFAULTS),
    default="model",
    show_default=True,
    help="Temperature, top_k, top_p, min_p and repetition_penalty of requests that do not give "
    "them: of the model's generation_config.json, or 1, and no filter or penalty.",
)
@click.option(
    "--sampling-mode",
    type=click.Choice(SAMPLING_MODES),
    default="auto",
    show_default=True,
    help="How the ranks of a group share the sampling.",
)
@click.option(
    "--batch-invariant",
    is_flag=True,
    help="A row's numbers do not depend on the batch around it: slower on a GPU, free on a CPU.",
)
@click.option(
    "--e4m7-weights",
    type=click.Choice(E4M7_WEIGHTS),
    default="auto",
    show_default=True,
    help="Weights of linear layers in 12 bits, on H100 SXM and H200: beside bfloat16's, or only. "
    "auto: beside, where they take a fifth of the memory at most.",
)
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(KV_CACHE_DTYPES),
    default="auto",
    show_default=True,
    help="Numbers of the KV cache: model, as --dtype, or e4m7, 12 bits on H100 and H200, a quarter "
    "more tokens. auto: e4m7 there for bfloat16 and heads of 64, 128 or 256, but not with "
    "--batch-invariant.",
)
@click.option(
    "--threads",
    type=range_of("threads"),
    help="Threads of each worker.  [default: 1 on a GPU, else its share of the cores]",
)
@click.option(
    "--step-timeout",
    type=range_of("step_timeout_s", least=0.1),
    default=30.0,
    show_default=True,
    help="Seconds after which a step, or a process that does not answer, counts as hung.",
)
@click.option(
    "--start-timeout",
    type=range_of("start_timeout_s", least=1),
    default=600.0,
    show_default=True,
    help="Seconds that a process may take to be ready.",
)
@click.option(
    "--max-group-restarts",
    type=range_of("max_group_restarts"),
    default=12,
    show_default=True,
    help="Restarts of a group in quick succession before it is given up.",
)
@click.option(
    "--shutdown-timeout",
    type=range_of("shutdown_timeout_s"),
    default=10.0,
    show_default=True,
    help="Seconds that requests in flight get when the node stops.",
)
@click.option(
    "--sim-step-ms",
    type=range_of("sim_step_ms", least=0.01),
    default=10.0,
    show_default=True,
    help="Step time of the sim device.",
)
@click.option(
    "--log-level",
    type=click.Choice(LOG_LEVELS),
    default="info",
    show_default=True,
)
@network_options
@click.option(
    "--seed",
    type=range_of("seed"),
    help="Draw the seeds of requests without one from it; else by chance.",
)
@click.option("--detach", is_flag=True, help="Return when the node is ready; it runs on.")
@name_option
def start(detach: bool, **given: Any) -> None:
    """Start a node: router, tokenizer, and the groups' processes.

    Without options it serves the demo model with one group on the best device
    there is.
    """
    from albireo.node.launch import run_detached, run_foreground

    from .display import StartDisplay

    try:
        options = _options(given)
    except (OptionError, PathError) as error:
        raise click.ClickException(str(error)) from None
    with StartDisplay(options) as display:
        sys.exit((run_detached if detach else run_foreground)(options, display.show))


def _options(given: dict[str, Any]) -> NodeOptions:
    node_dir(given["name"])
    template = given.pop("chat_template")
    if template is not None:
        template = text_of(template, "--chat-template")
    return NodeOptions(
        http=http_address(given.pop("http"), given.pop("host"), given.pop("port")),
        allowed_origins=names_in(given.pop("allowed_origins")),
        groups=parse_groups(given.pop("groups")),
        tenant_weights=parse_weights(given.pop("tenant_weights")),
        step_timeout_s=given.pop("step_timeout"),
        start_timeout_s=given.pop("start_timeout"),
        shutdown_timeout_s=given.pop("shutdown_timeout"),
        journal_fsync_s=given.pop("journal_fsync"),
        resume_grace_s=given.pop("resume_grace"),
        swap_space_gib=given.pop("swap_space"),
        block_size=int(given.pop("block_size")),
        chat_template=template,
        **given,
    )
