"""`albireo simulate`."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from albireo.node.options import OptionError, parse_groups, parse_weights

from .amounts import Amount
from .files import require_directory
from .ranges import range_of

if TYPE_CHECKING:
    from albireo.scheduler.limits import Limits
    from albireo.simulate.group import GroupShape
    from albireo.simulate.profile import Profile
    from albireo.simulate.report import Figures

_MANY_REQUESTS = 20_000
_MANY_BYTES = 1 << 20
_LONGEST = 1 << 24
_LENGTH = click.IntRange(1, _LONGEST)
_MOST_TOKENS = 1 << 28
"""Of a KV cache; the tables of more would fill this machine's memory."""


@click.command(context_settings={"show_default": True})
@click.option("--trace", type=click.Path(path_type=Path), help="Requests, a line of JSON each.")
@click.option(
    "--arrivals",
    metavar="poisson:RATE|load:SHARE",
    help="Requests at random: so many a second, or a share of what all slots can serve.",
)
@click.option("--requests", type=click.IntRange(min=1), default=10_000)
@click.option("--input-len", type=_LENGTH, default=256)
@click.option("--output-len", type=_LENGTH, default=64)
@click.option(
    "--prefix-len", type=click.IntRange(0, _LONGEST), default=0, help="Common to many prompts."
)
@click.option(
    "--prefixes", type=click.IntRange(1, _MOST_TOKENS), default=1, help="How many there are."
)
@click.option("--groups", default="1x1", metavar="GxT", help="As of `node start`, mixtures too.")
@click.option("--profile", default="h100-qwen3-8b", metavar="NAME|sim:MS[:PATH]|FILE.json")
@click.option("--max-model-len", type=click.IntRange(2, _LONGEST), default=8192)
@click.option("--max-num-seqs", type=range_of("max_num_seqs"), default=256)
@click.option(
    "--max-num-batched-tokens",
    type=range_of("max_num_batched_tokens"),
    help="[default: the profile's]",
)
@click.option(
    "--mixed-step-tokens",
    type=range_of("mixed_step_tokens"),
    help="Of steps that compute prompts beside few decodes; 0 = as of any.  "
    "[default: the profile's for each rank]",
)
@click.option("--max-num-queued-reqs", type=click.IntRange(0, 1 << 20), default=1024)
@click.option("--max-num-reqs-per-tenant", type=range_of("max_num_reqs_per_tenant"), default=0)
@click.option("--tenant-weights", default="", metavar="TENANT=W,...", help="As of `node start`.")
@click.option("--isolate-tenants", is_flag=True)
@click.option(
    "--kv-tokens",
    type=click.IntRange(16, _MOST_TOKENS),
    help="Of a group. [default: the profile's for each rank]",
)
@click.option("--block-size", type=click.IntRange(1, _MOST_TOKENS), default=16)
@click.option("--swap-space-tokens", type=click.IntRange(0, _MOST_TOKENS), default=0)
@click.option("--itl-target-ms", type=Amount(min=0), default=0.0)
@click.option("--async-scheduling/--no-async-scheduling", default=True)
@click.option("--enable-prefix-caching/--no-enable-prefix-caching", "caching", default=True)
@click.option("--slo", default="", metavar="ttft:MS,tpot:MS,e2e:MS", help="Of a good request.")
@click.option("--seed", type=click.IntRange(min=0), default=0)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    help="Share the groups; the result is the same.  [default: cores, for long simulations]",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A plot: .png, .svg or .pdf.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
def simulate(**options: Any) -> None:
    """The real scheduler and choice of groups on virtual time, with step times from a profile.

    A line of a trace: {"at": SECONDS, "input_len": 256, "output_len": 64}, and optionally
    prefix, prefix_len, prompt_ids, tenant, priority.
    """
    from albireo.simulate.plot import PlotError, draw, require_plot
    from albireo.simulate.profile import ProfileError
    from albireo.simulate.workload import WorkloadError

    output, as_json = options.pop("output"), options.pop("as_json")
    try:
        if output is not None:
            require_plot(output)
            require_directory(output)
        result, figures = _run(**options)
        click.echo(json.dumps(result, indent=2) if as_json else _table(result))
        if output is not None:
            draw(figures, f"{options['groups']} groups, {result['simulate']}", output)
    except (OptionError, ProfileError, WorkloadError, PlotError) as error:
        raise click.ClickException(str(error)) from None
    except MemoryError as error:
        raise click.ClickException(
            f"{str(error) or 'not enough memory'}: "
            "lower --max-num-seqs, --max-model-len or --kv-tokens"
        ) from None


def _run(
    *, trace: Path | None, arrivals: str | None, requests: int, input_len: int, output_len: int,
    prefix_len: int, prefixes: int, groups: str, profile: str, max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int | None, mixed_step_tokens: int | None, max_num_queued_reqs: int,
    max_num_reqs_per_tenant: int,
    tenant_weights: str, isolate_tenants: bool, kv_tokens: int | None,
    block_size: int, swap_space_tokens: int, itl_target_ms: float, async_scheduling: bool,
    caching: bool, slo: str, seed: int, processes: int | None,
) -> tuple[dict[str, Any], Figures]:  # fmt: skip
    from albireo.ipc.config import LOOKAHEAD, TenantConfig
    from albireo.ipc.cpu_quota import usable_cores
    from albireo.scheduler.limits import Limits
    from albireo.simulate.profile import load_profile
    from albireo.simulate.report import Figures
    from albireo.simulate.simulation import Simulation
    from albireo.simulate.workload import arrival_rate, random_arrivals, read_trace

    if (trace is None) == (arrivals is None):
        raise OptionError("give either --trace FILE or --arrivals poisson:RATE")
    ranks = parse_groups(groups)
    steps = load_profile(profile)
    batched = max_num_batched_tokens or max(max_num_seqs, steps.max_num_batched_tokens)
    if batched < max_num_seqs:
        raise OptionError(
            f"--max-num-batched-tokens {batched} is less than --max-num-seqs {max_num_seqs}"
        )
    limits = Limits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=batched,
        max_model_len=max_model_len,
        block_size=block_size,
        num_blocks=0,
        lookahead=LOOKAHEAD if async_scheduling else 0,
        prefix_caching=caching,
        num_swap_blocks=swap_space_tokens // block_size,
        itl_target_ms=itl_target_ms,
    )
    shapes = [_shape(limits, each, steps, kv_tokens, mixed_step_tokens) for each in ranks]
    if trace is not None:
        coming = read_trace(trace)
    else:
        rate = arrival_rate(arrivals or "", steps, ranks, max_num_seqs, input_len, output_len)
        coming = random_arrivals(rate, requests, input_len, output_len, prefix_len, prefixes, seed)
    figures = Figures(_slo(slo))
    if processes is None:
        processes = usable_cores() if _is_long(trace, requests) else 1
    tenants = TenantConfig(
        max_num_reqs=max_num_reqs_per_tenant, weights=parse_weights(tenant_weights),
        isolated=isolate_tenants,
    )  # fmt: skip
    began = time.perf_counter()
    simulation = Simulation(
        shapes, max_num_queued_reqs, steps, coming, seed, figures, processes, tenants
    )
    virtual_s = simulation.run()
    tree = figures.tree(virtual_s, time.perf_counter() - began)
    if figures.never is not None and not figures.completed:
        raise OptionError(figures.never)
    return {"simulate": steps.name, "groups": len(ranks), **tree}, figures


def _is_long(trace: Path | None, requests: int) -> bool:
    """Whether more processes save more time than their start takes."""
    if trace is None:
        return requests >= _MANY_REQUESTS
    return trace.is_file() and trace.stat().st_size >= _MANY_BYTES


def _shape(
    limits: Limits, ranks: int, profile: Profile, kv_tokens: int | None, mixed: int | None
) -> GroupShape:
    """kv_tokens, mixed: as the user gives them; None: the profile's for each rank."""
    from albireo.simulate.group import GroupShape

    blocks = (kv_tokens or ranks * profile.kv_tokens) // limits.block_size
    longest = min(limits.max_model_len, blocks * limits.block_size)
    if mixed is None:
        mixed = ranks * profile.mixed_step_tokens
    sized = replace(limits, num_blocks=blocks, max_model_len=longest, mixed_step_tokens=mixed)
    return GroupShape(sized, ranks)


def _slo(text: str) -> dict[str, float]:
    found = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition(":")
        try:
            found[name] = float(value) / 1e3
        except ValueError:
            found[name] = 0.0
        if name not in ("ttft", "tpot", "e2e") or not found[name] > 0:
            raise OptionError(f"--slo: {part!r} is not ttft:MS, tpot:MS or e2e:MS")
    return found


def _table(tree: dict[str, Any]) -> str:
    requests = tree["requests"]
    lines = [
        f"{requests['completed']:,} requests on {tree['groups']} groups of {tree['simulate']} in "
        f"{tree['virtual_s']:,.1f} s ({requests['refused']:,} refused): "
        f"{tree['requests_per_s']:,.1f} requests/s, {tree['output_tokens_per_s']:,.0f} tokens/s",
        f"{'ms':6}" + "".join(f"{name:>12}" for name in ("mean", "p50", "p90", "p99")),
    ]
    lines += [
        f"{name.upper():6}" + "".join(f"{value:12,.2f}" for value in tree[f"{name}_ms"].values())
        for name in ("ttft", "tpot", "itl", "e2e")
    ]
    goodput = tree["goodput"]
    lines.append(
        f"devices busy {tree['busy']:.1%} · goodput {goodput['share']:.1%}, "
        f"{goodput['requests_per_s']:,.1f} requests/s · {tree['preemptions']:,} preemptions · "
        f"{tree['prefix_hit_share']:.1%} of prompt tokens found in the caches"
    )
    lines.append(
        f"{tree['steps']:,} steps in {tree['wall_s']:,.1f} s, {tree['peak_memory_mib']:,} MiB"
    )
    return "\n".join(lines)
