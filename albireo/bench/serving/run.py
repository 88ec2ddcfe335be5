"""One run of `albireo bench serve`: warm-up, load, figures, and what the client itself cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import uvloop

from ..machine import spare_the_collector
from ..nodes import BenchError
from .connection import Answer, Connections, Target
from .datasets import Asked
from .figures import summary
from .load import LoadOptions, run_load


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """model: None = the first that the server names.
    body: fields of every request besides.
    metrics, percentiles: that are reported.  goodput_ms: metric -> what is good at most.
    """

    target: Target
    endpoint: str = "/v1/completions"
    model: str | None = None
    ignore_eos: bool = False
    stream_usage: bool = True
    body: dict[str, Any] = {}
    load: LoadOptions = LoadOptions()
    metrics: Sequence[str] = ("ttft", "tpot", "itl")
    percentiles: Sequence[float] = (99.0,)
    goodput_ms: Mapping[str, float] = {}


class Run(msgspec.Struct, frozen=True):
    """answers: each with the time at which it was due, and `began`, of time.perf_counter()."""

    result: dict[str, Any]
    answers: list[tuple[float, Answer]]
    began: float

    def details(self) -> dict[str, list[Any]]:
        """Of every request, in order: lengths, times in seconds, the error."""
        only = [answer for _, answer in self.answers]
        return {
            "start_times": [round(answer.began - self.began, 6) for answer in only],
            "input_lens": [answer.prompt_tokens for answer in only],
            "output_lens": [answer.new_tokens for answer in only],
            "ttfts": [
                round(answer.first - answer.began, 6) if answer.has_times else None
                for answer in only
            ],
            "itls": [[round(gap, 6) for gap in answer.gaps] for answer in only],
            "errors": [answer.error for answer in only],
        }


def bench_serve(
    options: ServeOptions,
    warm_ups: Sequence[Asked],
    asked: Sequence[Asked],
    on_end: Callable[[Answer], None],
) -> Run:
    """Asks all, and singly before, without measuring, what is to warm the server up.

    Raises BenchError when the server cannot be asked at all.
    """
    return uvloop.run(_run(options, warm_ups, asked, on_end))


async def _run(
    options: ServeOptions,
    warm_ups: Sequence[Asked],
    asked: Sequence[Asked],
    on_end: Callable[[Answer], None],
) -> Run:
    connections = Connections(options.target)
    model = options.model or await _first_model(connections, options)
    requests = [_request(options, model, each) for each in asked]
    for each in warm_ups:
        answer = await connections.ask(_request(options, model, each), options.load.timeout_s)
        if answer.error is not None:
            raise BenchError(f"the first request failed: {answer.error}{_hint(each)}")
    spare_the_collector()
    cpu = time.process_time()
    began = time.perf_counter()
    answers = await run_load(connections, requests, options.load, on_end)
    wall_s = time.perf_counter() - began
    cpu_s = time.process_time() - cpu
    connections.close()
    only = [answer for _, answer in answers]
    events = sum(answer.events for answer in only)
    lens = [len(each.prompt) if isinstance(each.prompt, list) else None for each in asked]
    rate = options.load.request_rate
    errors = [answer.error for answer in only if answer.error is not None]
    result = {
        "bench": "serve",
        "server": str(options.target),
        "endpoint": options.endpoint,
        "model": model,
        "num_prompts": len(asked),
        "request_rate": rate if math.isfinite(rate) else "inf",
        "burstiness": options.load.burstiness,
        "max_concurrency": options.load.max_concurrency,
        **summary(
            only, lens, wall_s, options.metrics, options.percentiles, options.goodput_ms
        ),
        "client_cpu_share_of_a_core": round(cpu_s / wall_s, 3),
        "client_us_per_event": round(cpu_s / events * 1e6, 2) if events else None,
        "errors": _counted(errors),
    }  # fmt: skip
    return Run(result, answers, began)


async def _first_model(connections: Connections, options: ServeOptions) -> str:
    """Raises BenchError."""
    request = options.target.request("GET", "/v1/models")
    answer = await connections.ask(request, options.load.timeout_s, stream=False)
    if answer.error is None:
        try:
            return str(msgspec.json.decode(answer.body)["data"][0]["id"])
        except (msgspec.MsgspecError, KeyError, IndexError, TypeError):
            answer.error = "its /v1/models names none"
    raise BenchError(f"the server does not say what it serves, give --model: {answer.error}")


def _request(options: ServeOptions, model: str, asked: Asked) -> bytes:
    body: dict[str, Any] = {"model": model, "stream": True}
    if options.endpoint.endswith("/chat/completions"):
        body["messages"] = [{"role": "user", "content": asked.prompt}]
        body["max_completion_tokens"] = asked.output_len
    else:
        body["prompt"] = asked.prompt
        body["max_tokens"] = asked.output_len
    if options.stream_usage:
        body["stream_options"] = {"include_usage": True}
    if options.ignore_eos:
        body["ignore_eos"] = True
    body |= options.body
    return options.target.request("POST", options.endpoint, msgspec.json.encode(body))


def _hint(asked: Asked) -> str:
    if isinstance(asked.prompt, list):
        return " (the prompt was token ids; --random-input-as text asks with words instead)"
    return ""


def _counted(errors: list[str]) -> dict[str, int]:
    """Message -> how often."""
    found: dict[str, int] = {}
    for each in errors:
        found[each] = found.get(each, 0) + 1
    return found
