"""A simulation tells what a node of the `sim` device does with the same requests."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop
from click.testing import CliRunner

from albireo.bench.nodes import running_node
from albireo.cli.main import main
from albireo.client import AlbireoError, AsyncClient, Delta, SamplingParams
from albireo.node.options import NodeOptions

STEP_MS = 50.0
SLOTS = 12
REQUESTS = 100
BOUNDS = {"mean": 0.05, "p50": 0.05, "p99": 0.15}
TRIES = 3
"""Runs of which one has to fit: whatever else keeps the machine busy makes single ones late."""


def trace() -> list[dict[str, Any]]:
    """At 0.7 of what the slots serve, so that some wait."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(8, 25, REQUESTS)
    rate = 0.7 * SLOTS / (lengths.mean() * STEP_MS / 1e3)
    at = np.cumsum(rng.exponential(1 / rate, REQUESTS))
    return [
        {"at": float(when), "input_len": 40, "output_len": int(length)}
        for when, length in zip(at, lengths, strict=True)
    ]


async def measure_path_ms(node: str) -> float:
    """What an answer of one token takes beside its step, when nobody else asks."""
    taken = []
    async with await AsyncClient.connect(node=node) as client:
        for _ in range(9):
            began = time.perf_counter()
            await client.generate([7] * 40, max_tokens=1, ignore_eos=True)
            taken.append((time.perf_counter() - began) * 1e3)
            await asyncio.sleep(0.01)
    return statistics.median(taken) - STEP_MS


async def measure(node: str, lines: list[dict[str, Any]]) -> list[list[float]]:
    """Arrival times of the tokens of each request, after it was sent."""
    rng = np.random.default_rng(6)
    async with await AsyncClient.connect(node=node) as client:
        done = asyncio.Event()
        left = len(lines)
        found: list[list[float]] = []

        def send(line: dict[str, Any]) -> None:
            times: list[float] = []
            found.append(times)
            sent = time.perf_counter()

            def receive(reply: Delta | AlbireoError) -> None:
                nonlocal left
                if isinstance(reply, Delta):
                    times.extend([time.perf_counter() - sent] * len(reply.token_ids))
                if not isinstance(reply, Delta) or reply.end is not None:
                    left -= 1
                    if not left:
                        done.set()

            prompt = rng.integers(20, client.welcome.vocab_size, line["input_len"]).tolist()
            params = SamplingParams(max_tokens=line["output_len"], ignore_eos=True)
            client.submit(prompt, receive, params)

        loop = asyncio.get_running_loop()
        begin = loop.time() + 0.2
        for line in lines:
            loop.call_at(begin + line["at"], send, line)
        await done.wait()
    assert [len(each) for each in found] == [line["output_len"] for line in lines]
    return found


def summary(times: list[list[float]]) -> dict[str, dict[str, float]]:
    """Of TTFT and TPOT in milliseconds: mean, P50 and P99."""
    ttft = np.array([each[0] for each in times]) * 1e3
    tpot = np.array([(each[-1] - each[0]) / (len(each) - 1) for each in times]) * 1e3
    return {
        name: {
            "mean": float(values.mean()),
            "p50": float(np.percentile(values, 50, method="inverted_cdf")),
            "p99": float(np.percentile(values, 99, method="inverted_cdf")),
        }
        for name, values in (("ttft_ms", ttft), ("tpot_ms", tpot))
    }


@pytest.mark.node
def test_a_run_is_reproduced(node_home: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    lines = trace()
    options = NodeOptions(
        model=str(tiny_model_dir), device="sim", sim_step_ms=STEP_MS, max_num_seqs=SLOTS,
        max_num_batched_tokens=512, max_model_len=128, enable_prefix_caching=False,
    )  # fmt: skip
    path = write(tmp_path / "trace", lines)
    with running_node(options) as node:
        for _ in range(TRIES):
            simulated = simulate(path, uvloop.run(measure_path_ms(node)))
            assert simulated["requests"]["completed"] == REQUESTS
            wrong = differences(summary(uvloop.run(measure(node, lines))), simulated)
            if not wrong:
                return
    pytest.fail("; ".join(wrong))


def differences(
    measured: dict[str, dict[str, float]], simulated: dict[str, dict[str, float]]
) -> list[str]:
    """What is not within the bounds."""
    return [
        f"{name} {part}: simulated {simulated[name][part]:.2f}, measured {value:.2f}"
        for name, values in measured.items()
        for part, value in values.items()
        if abs(simulated[name][part] / value - 1) > BOUNDS[part]
    ]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def simulate(path: Path, path_ms: float) -> dict[str, Any]:
    ended = CliRunner().invoke(
        main,
        ["simulate", "--trace", str(path), "--profile", f"sim:{STEP_MS}:{max(0.0, path_ms)}",
         "--max-num-seqs", str(SLOTS), "--max-num-batched-tokens", "512", "--max-model-len", "128",
         "--no-enable-prefix-caching", "--json"],
    )  # fmt: skip
    assert ended.exit_code == 0, ended.output
    return dict(json.loads(ended.stdout))
