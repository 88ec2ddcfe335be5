"""`albireo bench gateway`: what a server-sent event costs the HTTP gateway.

A node of the `sim` device makes a token for every stream in each step; streaming
HTTP clients in a process of their own read them (http_streams.py).  The
gateway's CPU time over the events that the clients got is its cost for one, the
link to the router included.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from typing import Any

import msgspec

from albireo.client import Client
from albireo.node.events import Event, NodeReady
from albireo.node.options import NodeOptions

from .http_streams import Plan, Streamed
from .machine import cpu_seconds, machine
from .nodes import BenchError, running_node
from .serving.connection import Target

_WARM_UP_TOKENS = 20
_PATIENCE_S = 300.0


def bench_gateway(
    options: NodeOptions, streams: int, tokens: int, *, chat: bool, uds: bool
) -> dict[str, Any]:
    """Runs a node with `options` (device sim) and its gateways under `streams` streams.

    uds: over a Unix socket instead of TCP.  Raises BenchError when a stream fails.
    """
    with tempfile.TemporaryDirectory(prefix="albireo-") as scratch:
        path = f"{scratch}/http.sock"
        options = msgspec.structs.replace(
            options, device="sim", max_num_seqs=max(streams, 1),
            http=None if uds else "127.0.0.1:0", uds=path if uds else None,
        )  # fmt: skip
        urls = ["http://localhost"]

        def listen(event: Event) -> None:
            if isinstance(event, NodeReady) and not uds:
                urls[0] = event.facts["http"]

        with running_node(options, listen) as node, Client.connect(node=node) as client:
            target = Target.parse(urls[0], path if uds else None, None)
            plan = Plan(
                target=target, model=client.welcome.model, chat=chat, streams=streams,
                tokens=tokens, warm_up_tokens=_WARM_UP_TOKENS,
            )  # fmt: skip
            streamed, cpu = _measure(client, plan)
    if streamed.tokens != streams * tokens:
        raise BenchError(f"{streamed.tokens} tokens came, not {streams} x {tokens}")
    gateway_s = sum(seconds for name, seconds in cpu.items() if name.startswith("gateway"))
    return {
        "bench": "gateway",
        "machine": machine(),
        "endpoint": "chat" if chat else "completions",
        "transport": "unix" if uds else "tcp",
        "gateways": options.gateways,
        "streams": streams,
        "tokens_per_stream": tokens,
        "step_ms": options.sim_step_ms,
        "wall_s": round(streamed.wall_s, 3),
        "tokens_per_s": round(streamed.tokens / streamed.wall_s),
        "events": streamed.events,
        "events_per_s": round(streamed.events / streamed.wall_s),
        "gateway_us_per_event": round(gateway_s / streamed.events * 1e6, 2),
        "gateway_us_per_token": round(gateway_s / streamed.tokens * 1e6, 2),
        "client_us_per_event": round(streamed.cpu_s / streamed.events * 1e6, 2),
        "ttft_ms_median": round(streamed.ttft_ms_median, 2),
        "itl_ms_median": round(streamed.itl_ms_median, 2),
        "itl_ms_p99": round(streamed.itl_ms_p99, 2),
        "itl_ms_max": round(streamed.itl_ms_max, 2),
        "cpu_share_of_a_core": {
            name: round(seconds / streamed.wall_s, 3)
            for name, seconds in (cpu | {"(clients)": streamed.cpu_s}).items()
        },
    }


def _measure(client: Client, plan: Plan) -> tuple[Streamed, dict[str, float]]:
    """What the clients saw, and the CPU seconds of each process of the node meanwhile."""
    pids = {actor["name"]: actor["pid"] for actor in client.status()["actors"]}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "albireo.bench.http_streams",
         msgspec.json.encode(plan).decode()],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        ready = process.stdout.readline()
        before = {name: cpu_seconds(pid) for name, pid in pids.items()}
        output, complaint = "", ""
        if ready:
            output, complaint = process.communicate("go\n", timeout=_PATIENCE_S)
        else:
            _, complaint = process.communicate(timeout=10)
        after = {name: cpu_seconds(pid) for name, pid in pids.items()}
    except subprocess.TimeoutExpired:
        raise BenchError(f"the streams have not ended within {_PATIENCE_S:g} s") from None
    finally:
        process.kill()
    if process.returncode != 0:
        raise BenchError(f"the clients failed: {complaint.strip()[-600:]}")
    return (
        msgspec.json.decode(output, type=Streamed),
        {name: after[name] - before[name] for name in pids},
    )
