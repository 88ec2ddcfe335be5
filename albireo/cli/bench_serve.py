"""`albireo bench serve`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .amounts import Amount
from .bench_parts import dataset_of, dataset_options

if TYPE_CHECKING:
    from albireo.bench.serving import DatasetOptions, Run, ServeOptions

_METRICS = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}
_GOOD = ("ttft", "tpot", "e2el")
_MOST_ERRORS = 3
_BUSY = 0.8
"""Share of a core above which what the client sees waits for the client."""

_count = click.IntRange(min=1)
_rate = Amount(min=0, min_open=True, endless=True)  # inf = all at once
_above_0 = Amount(min=0, min_open=True)
_file = click.Path(dir_okay=False, path_type=Path)


@click.command(context_settings={"show_default": True})
@click.option("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="The server.")
@click.option("--uds", metavar="PATH", help="Its Unix socket, instead of the URL's host.")
@click.option(
    "--endpoint", default="/v1/completions", metavar="PATH", help="Or /v1/chat/completions."
)
@click.option("--model", metavar="NAME", help="[default: the first that the server names]")
@click.option("--api-key", metavar="KEY", envvar="OPENAI_API_KEY", show_envvar=True)
@click.option("--num-prompts", type=_count, default=1000)
@click.option("--num-warmups", type=click.IntRange(min=0), default=1, help="Others, sent before.")
@click.option("--request-rate", type=_rate, default="inf", help="Arrivals a second.")
@click.option(
    "--burstiness", type=_above_0, default=1.0, help="1 = Poisson arrivals; below in bursts."
)
@click.option("--max-concurrency", type=_count, help="Most requests at once.")
@click.option("--request-timeout", type=_above_0, default=3600.0, help="Seconds for an answer.")
@dataset_options
@click.option(
    "--random-input-as",
    type=click.Choice(("auto", "ids", "text")),
    default="auto",
    help="Token ids, or words; auto = words for chat.",
)
@click.option("--random-ids", default="1000:30000", metavar="FIRST:BEHIND", help="Of such prompts.")
@click.option("--ignore-eos", is_flag=True, help="Answers have their full length.")
@click.option("--temperature", type=Amount(min=0), default=0.0)
@click.option("--extra-body", default="{}", metavar="JSON", help="Fields of every request.")
@click.option("--stream-usage/--no-stream-usage", default=True, help="Ask for counts of tokens.")
@click.option("--percentile-metrics", default="ttft,tpot,itl", metavar="ttft,tpot,itl,e2el")
@click.option("--metric-percentiles", default="99", metavar="P,...")
@click.option("--goodput", metavar="ttft:MS tpot:MS e2el:MS", help="Of a good request, at most.")
@click.argument("more_goodput", nargs=-1, metavar="")
@click.option("--save-result", is_flag=True, help="Write the result to a file.")
@click.option("--save-detailed", is_flag=True, help="With every request's times.")
@click.option("--result-dir", type=click.Path(file_okay=False, path_type=Path), default=".")
@click.option("--result-filename", metavar="FILE", help="[default: by endpoint, rate and time]")
@click.option("--plot", type=_file, metavar="FILE", help="A picture: .png, .svg or .pdf.")
@click.option("--progress/--no-progress", default=True, help="A bar, on a terminal.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
def serve(**given: Any) -> None:
    """Load on an OpenAI-compatible HTTP server, and what its clients see."""
    with _errors():
        run = _run(given)
    saved = None
    try:
        # First: nobody may read what is printed.
        with _errors():
            saved = _save(run, given) if _is_saved(given) else None
            _draw(run, given["plot"])
    finally:
        click.echo(json.dumps(run.result, indent=2) if given["as_json"] else _table(run.result))
        if saved is not None and not given["as_json"]:
            click.echo(f"saved as {saved}")
    if not run.result["completed"]:
        raise click.ClickException("no request was answered")


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """What is wrong with the arguments, the server or a file, in one line."""
    from albireo.bench.nodes import BenchError
    from albireo.bench.serving import DatasetError
    from albireo.simulate.plot import PlotError

    try:
        yield
    except (BenchError, DatasetError, PlotError, OSError) as error:
        raise click.ClickException(str(error)) from None


def _run(given: dict[str, Any]) -> Run:
    from albireo.bench.serving import bench_serve, make_requests, make_warm_ups
    from albireo.offline.progress import counting
    from albireo.simulate.plot import require_plot

    options, dataset = _serve_options(given), _dataset_options(given)
    asked, warm_ups = make_requests(dataset), make_warm_ups(dataset, given["num_warmups"])
    if given["plot"] is not None:
        require_plot(given["plot"])
    if _is_saved(given):
        given["result_dir"].mkdir(parents=True, exist_ok=True)
    with counting(given["progress"], len(asked)) as show:
        return bench_serve(
            options,
            warm_ups,
            asked,
            lambda answer: show(answer.prompt_tokens or 0, answer.new_tokens),
        )


def _serve_options(given: dict[str, Any]) -> ServeOptions:
    from albireo.bench.serving import LoadOptions, ServeOptions, Target

    if not given["endpoint"].startswith("/"):
        raise click.BadParameter("a path begins with /", param_hint="--endpoint")
    return ServeOptions(
        target=Target.parse(given["base_url"], given["uds"], given["api_key"]),
        endpoint=given["endpoint"],
        model=given["model"],
        ignore_eos=given["ignore_eos"],
        stream_usage=given["stream_usage"],
        body={"temperature": given["temperature"], **_extra(given["extra_body"])},
        load=LoadOptions(
            request_rate=given["request_rate"],
            burstiness=given["burstiness"],
            max_concurrency=given["max_concurrency"],
            timeout_s=given["request_timeout"],
            seed=given["seed"],
        ),
        metrics=_metrics(given["percentile_metrics"]),
        percentiles=_percentiles(given["metric_percentiles"]),
        goodput_ms=_goodput(given["goodput"], given["more_goodput"]),
    )


def _dataset_options(given: dict[str, Any]) -> DatasetOptions:
    kind, chat = given["random_input_as"], given["endpoint"].endswith("/chat/completions")
    if chat and kind == "ids":
        raise click.BadParameter("conversations are text", param_hint="--random-input-as")
    first, _, behind = given["random_ids"].partition(":")
    if not (first.isdecimal() and behind.isdecimal()):
        raise click.BadParameter("give FIRST:BEHIND", param_hint="--random-ids")
    as_ids = kind == "ids" or (kind == "auto" and not chat)
    return dataset_of(given, as_ids=as_ids, ids=(int(first), int(behind)))


def _extra(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--extra-body") from None
    if not isinstance(fields, dict):
        raise click.BadParameter("give a JSON object", param_hint="--extra-body")
    return fields


def _metrics(text: str) -> tuple[str, ...]:
    names = tuple(filter(None, text.split(",")))
    for name in names:
        if name not in _METRICS:
            raise click.BadParameter(
                f"{name!r} is not one of {', '.join(_METRICS)}", param_hint="--percentile-metrics"
            )
    return names


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(",") if part)
    except ValueError:
        found = (-1.0,)
    if not all(0 <= each <= 100 for each in found):
        raise click.BadParameter("give numbers of 0 to 100", param_hint="--metric-percentiles")
    return found


def _goodput(first: str | None, more: tuple[str, ...]) -> dict[str, float]:
    """ "ttft:200" and its followers, parted by spaces or commas, to metric -> ms."""
    if first is None and more:
        raise click.UsageError(f"unexpected arguments: {' '.join(more)}")
    found = {}
    for part in " ".join((first or "", *more)).replace(",", " ").split():
        name, _, value = part.partition(":")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = 0.0
        if name not in _GOOD or not found[name] > 0:
            raise click.BadParameter(
                f"{part!r} is not ttft:MS, tpot:MS or e2el:MS", param_hint="--goodput"
            )
    return found


def _is_saved(given: dict[str, Any]) -> bool:
    return bool(given["save_result"] or given["save_detailed"] or given["result_filename"])


def _save(run: Run, given: dict[str, Any]) -> Path:
    """Writes the result; the file's path.  Raises OSError."""
    now = datetime.now()
    endpoint = given["endpoint"].removeprefix("/v1/").strip("/").replace("/", "-")
    name = given["result_filename"] or (
        f"albireo-{endpoint}-{run.result['request_rate']}qps-{now:%Y%m%d-%H%M%S}.json"
    )
    path: Path = given["result_dir"] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    tree = {"date": now.isoformat(timespec="seconds"), **run.result}
    if given["save_detailed"]:
        tree |= run.details()
    path.write_text(json.dumps(tree, indent=2) + "\n")
    return path


def _draw(run: Run, path: Path | None) -> None:
    """The picture, where one is asked for.  Raises PlotError and OSError."""
    if path is not None:
        from albireo.bench.serving.plot import draw_run

        draw_run(run, path)


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['completed']:,} requests answered, {result['failed']:,} failed, in "
        f"{result['duration']:,.2f} s: {result['request_throughput']:,.2f} requests/s",
        f"{result['total_input_tokens']:,} tokens in, {result['total_output_tokens']:,} out "
        f"(counted by {result['tokens_counted_by']}): {result['output_throughput']:,.1f} new "
        f"tokens/s, {result['total_token_throughput']:,.1f} in all",
    ]
    if "good" in result:
        limits = ", ".join(f"{name} {most:g}" for name, most in result["goodput_ms"].items())
        lines.append(
            f"goodput {result['request_goodput']:,.2f} requests/s: {result['good']:,} within "
            f"{limits} ms"
        )
    for name, words in _METRICS.items():
        found = {
            key.removesuffix(f"_{name}_ms"): value
            for key, value in result.items()
            if key.endswith(f"_{name}_ms")
        }
        if found:
            values = "".join(f"  {key} {value:,.2f}" for key, value in found.items())
            lines.append(f"{words + ', ms':26}{values}")
    cost = result["client_us_per_event"]
    lines.append(
        f"this client: {result['client_cpu_share_of_a_core']:.1%} of a core"
        + (f", {cost:.1f} us an event" if cost else "")
    )
    if result["client_cpu_share_of_a_core"] > _BUSY:
        lines.append("the client was busy itself: its times are longer than the server's")
    errors = list(result["errors"].items())
    lines += [f"failed, {count} times: {text[:300]}" for text, count in errors[:_MOST_ERRORS]]
    return "\n".join(lines)
