"""`albireo bench serve` against a real node's gateway, on devices whose times are known."""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from albireo.cli.bench import bench
from albireo.cli.bench_serve import _table
from albireo.node.launch import stop_node

from ..gateway.conftest import HttpNode, start_http_node
from .played_server import DONE, chunked, playing, text

KEY = "key-of-bench"
STEP_MS = 20.0


@pytest.fixture(scope="module")
def server(module_home: Path, tiny_model_dir: Path) -> Iterator[HttpNode]:
    """The tiny tokenizer of 264 ids, a key, a token every 20 ms."""
    node = start_http_node(
        module_home, name="serve", device="sim", sim_step_ms=STEP_MS, model=str(tiny_model_dir),
        served_model_name="tiny", api_key=KEY,
    )  # fmt: skip
    yield node
    stop_node(node.name, now=True, timeout_s=20)


def serve(node: HttpNode, *words: str) -> Result:
    fixed = ["--base-url", node.http, "--api-key", KEY, "--random-ids", "0:256", "--ignore-eos"]
    return CliRunner().invoke(bench, ["serve", *fixed, *words])


def result(node: HttpNode, *words: str) -> dict[str, Any]:
    ended = serve(node, "--json", *words)
    assert ended.exit_code == 0, ended.output
    return dict(json.loads(ended.stdout))


@pytest.mark.node
def test_completions(server: HttpNode) -> None:
    found = result(
        server, "--num-prompts", "12", "--max-concurrency", "4", "--random-input-len", "20",
        "--random-output-len", "30", "--percentile-metrics", "ttft,tpot,itl,e2el",
        "--metric-percentiles", "50,99", "--goodput", "ttft:5000", "tpot:1",
    )  # fmt: skip
    assert (found["completed"], found["failed"], found["errors"]) == (12, 0, {})
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (240, 360)
    assert (found["model"], found["tokens_counted_by"]) == ("tiny", "usage")
    assert found["median_tpot_ms"] == pytest.approx(STEP_MS, rel=0.1)
    assert found["p50_itl_ms"] == pytest.approx(STEP_MS, rel=0.1)
    assert found["p99_e2el_ms"] >= found["p50_e2el_ms"] > 29 * STEP_MS
    # Three rounds of four.
    assert found["duration"] > 3 * 29 * STEP_MS / 1e3
    assert found["good"] == 0 and 0 < found["client_us_per_event"] < 5000


@pytest.mark.node
def test_chat_over_a_unix_socket(server: HttpNode) -> None:
    found = result(
        server, "--uds", server.uds, "--endpoint", "/v1/chat/completions", "--num-prompts", "5",
        "--random-input-len", "10", "--random-output-len", "8", "--request-rate", "50",
        "--extra-body", '{"seed": 3}', "--no-stream-usage",
    )  # fmt: skip
    assert (found["completed"], found["tokens_counted_by"]) == (5, "events")
    assert 5 <= found["total_output_tokens"] <= 40 and found["server"] == server.uds


@pytest.mark.node
@pytest.mark.parametrize("name", ["prefix_repetition", "custom", "sharegpt"])
def test_other_data_sets(server: HttpNode, name: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    words = ["--prefix-repetition-output-len", "6", "--prefix-repetition-num-prefixes", "2"]
    if name == "custom":
        path.write_text('{"prompt": "Once upon a time", "output_len": 6}\n')
        words = ["--dataset-path", str(path)]
    if name == "sharegpt":
        turns = [{"value": "What is the time?"}, {"value": "It is late. Go to bed now."}]
        path.write_text(json.dumps([{"conversations": turns}]))
        words = ["--dataset-path", str(path)]
    words += ["--prefix-repetition-prefix-len", "32", "--prefix-repetition-suffix-len", "8"]
    found = result(server, "--dataset-name", name, "--num-prompts", "4", *words)
    assert (found["completed"], found["total_output_tokens"]) == (4, 24)


@pytest.mark.node
def test_files(server: HttpNode, tmp_path: Path) -> None:
    ended = serve(
        server, "--num-prompts", "3", "--random-input-len", "8", "--random-output-len", "5",
        "--save-result", "--save-detailed", "--result-dir", str(tmp_path / "results"),
        "--plot", str(tmp_path / "plot.png"), "--goodput", "e2el:60000",
    )  # fmt: skip
    assert ended.exit_code == 0, ended.output
    assert "3 requests answered, 0 failed" in ended.output and "goodput" in ended.output
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    (path,) = (tmp_path / "results").iterdir()
    saved = json.loads(path.read_text())
    assert saved["output_lens"] == [5, 5, 5] and saved["input_lens"] == [8, 8, 8]
    assert saved["request_rate"] == "inf" and saved["errors"] == [None] * 3
    assert all(0 < each < 10 for each in saved["ttfts"])
    assert path.name.startswith("albireo-completions-infqps-")


@pytest.mark.node
def test_a_file_that_cannot_be_written_costs_no_result(server: HttpNode, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    words = ["--num-prompts", "2", "--random-input-len", "8", "--random-output-len", "5"]
    words += ["--result-dir", str(tmp_path), "--result-filename", "there"]
    ended = serve(server, *words)
    assert ended.exit_code == 1 and "Is a directory" in ended.output
    assert "2 requests answered, 0 failed" in ended.output


def test_a_reader_who_has_gone_costs_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of `albireo bench serve --save-result | head -0`."""

    def broken(*_: Any, **__: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    async def ask() -> Result:
        answer = chunked(text("a", "length") + DONE)
        words = ["--uds", str(tmp_path / "s"), "--model", "m", "--num-prompts", "2"]
        words += ["--result-dir", str(tmp_path), "--result-filename", "found.json"]
        async with playing(tmp_path / "s", lambda _: [answer]):
            return await asyncio.to_thread(CliRunner().invoke, bench, ["serve", *words])

    monkeypatch.setattr("albireo.cli.bench_serve.click.echo", broken)
    ended = asyncio.run(ask())
    assert (ended.exit_code, ended.output) == (1, "")
    assert json.loads((tmp_path / "found.json").read_text())["completed"] == 2


@pytest.mark.parametrize("name", ["random", "prefix_repetition"])
def test_no_prompt_that_is_measured_has_been_asked_before(tmp_path: Path, name: str) -> None:
    async def ask() -> list[bytes]:
        answer = chunked(text("a", "length") + DONE)
        words = ["--uds", str(tmp_path / "s"), "--model", "m", "--dataset-name", name]
        words += ["--num-prompts", "5", "--num-warmups", "4"]
        async with playing(tmp_path / "s", lambda _: [answer]) as (played, _):
            ended = await asyncio.to_thread(CliRunner().invoke, bench, ["serve", *words])
            assert ended.exit_code == 0, ended.output
        return played.bodies

    bodies = asyncio.run(ask())
    assert len(bodies) == len(set(bodies)) == 9


@pytest.mark.node
def test_what_the_server_refuses(server: HttpNode) -> None:
    ended = serve(server, "--random-ids", "1000:2000", "--num-prompts", "2")
    assert ended.exit_code == 1
    assert "the first request failed: HTTP 400" in ended.output
    assert "--random-input-as text" in ended.output
    ended = serve(server, "--api-key", "wrong", "--num-prompts", "2")
    assert ended.exit_code == 1 and "HTTP 401" in ended.output
    ended = serve(server, "--random-ids", "1000:2000", "--num-prompts", "2", "--num-warmups", "0")
    assert ended.exit_code == 1 and "2 failed" in ended.output and "HTTP 400" in ended.output


def test_a_busy_client_is_said() -> None:
    figures = {
        "completed": 1, "failed": 0, "duration": 1.0, "request_throughput": 1.0,
        "total_input_tokens": 1, "total_output_tokens": 1, "tokens_counted_by": "usage",
        "output_throughput": 1.0, "total_token_throughput": 2.0, "client_us_per_event": 10.0,
        "errors": {},
    }  # fmt: skip
    assert "busy itself" in _table(figures | {"client_cpu_share_of_a_core": 0.95})
    assert "busy itself" not in _table(figures | {"client_cpu_share_of_a_core": 0.3})


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--base-url", "nowhere"], "give http://HOST:PORT"),
        (["--base-url", "http://127.0.0.1:9"], "no connection to http://127.0.0.1:9"),
        (["--goodput", "ttft:x"], "'ttft:x' is not ttft:MS"),
        (["ttft:200"], "unexpected arguments: ttft:200"),
        (["--request-rate", "0"], "x>0"),
        (["--percentile-metrics", "ttft,ttlt"], "'ttlt' is not one of"),
        (["--metric-percentiles", "101"], "numbers of 0 to 100"),
        (["--extra-body", "[]"], "give a JSON object"),
        (["--random-ids", "7"], "give FIRST:BEHIND"),
        (["--endpoint", "chat/completions"], "a path begins with /"),
        (
            ["--endpoint", "/v1/chat/completions", "--random-input-as", "ids"],
            "conversations are text",
        ),
        (["--dataset-name", "custom"], "needs --dataset-path"),
        (["--plot", "plot.xyz"], "must end in .png"),
        (["--plot", "/no/such/plot.png"], "there is no directory /no/such"),
        (["--save-result", "--result-dir", "/dev/null/x"], "Not a directory"),
    ],
)
def test_what_is_wrong_is_said(words: list[str], reason: str) -> None:
    ended = CliRunner().invoke(bench, ["serve", *words])
    assert ended.exit_code != 0 and reason in ended.output
