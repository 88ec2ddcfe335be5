"""The command line as a user types it, on a node of the tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from albireo.cli.bench_parts import sizes_of
from albireo.cli.main import main
from albireo.cli.start import start
from albireo.ipc.paths import log_path
from albireo.node.options import OptionError
from albireo.node.runtime_dir import is_running

ALBIREO = str(Path(sys.executable).with_name("albireo"))


def albireo(*words: str, status: int = 0, text: str | None = None) -> subprocess.CompletedProcess:
    """Runs a command; its output, after checking its exit status."""
    done = subprocess.run(
        [ALBIREO, *words], input=text, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == status, f"{words}: {done.stdout}\n{done.stderr}"
    return done


@pytest.mark.parametrize(
    "words", [("trace", "-o", "t.html"), ("simulate", "--requests", "1000000000", "-o", "p.svg")]
)
def test_what_could_not_be_written_is_not_waited_for(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    asked = CliRunner().invoke(main, [*words[:-1], str(tmp_path / "no" / words[-1])])
    assert asked.exit_code == 1 and f"there is no directory {tmp_path / 'no'}" in asked.output


@pytest.mark.parametrize("words", [(), ("node",), ("node", "start"), ("bench",), ("chat",)])
def test_help_is_quick(words: tuple[str, ...]) -> None:
    """Under 0.3 s, or on a slow or busy machine under five times what bare Python needs."""
    took, bare = [], []
    for _ in range(4):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "import click"], check=True)
        bare.append(time.monotonic() - began)
        began = time.monotonic()
        assert "Usage: albireo" in albireo(*words, "--help").stdout
        took.append(time.monotonic() - began)
    assert min(took) < max(0.3, 5 * min(bare))


def test_version() -> None:
    assert albireo("--version").stdout.strip() == "albireo, version 0.1.0"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("node", "start", "--groups", "2y"), "expected GROUPSxTP"),
        (("node", "start", "--name", "a/b"), "cannot name a node"),
        (("node", "start", "--model", "/no/such"), "no such file or directory"),
        (("node", "stop",), "no node named 'default' is running"),
        (("node", "status",), "no node named 'default' is running"),
        (("node", "logs",), "there is no log"),
        (("generate", "x"), "no node named 'default' is running"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(node_home: Path, words: tuple[str, ...], reason: str) -> None:
    done = albireo(*words, status=1)
    assert reason in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("option", "value", "bound"),
    [
        ("--seed", "999999999999999999999999", "-9223372036854775808<=x<=9223372036854775807"),
        ("--max-num-queued-reqs", str(1 << 64), "0<=x<=2147483647"),
        ("--max-num-batched-tokens", "9999999", "1<=x<=131072"),
        ("--journal-max-mib", "9999999", "16<=x<=1048576"),
        ("--swap-space", "1e300", "0<=x<=1000000000.0"),
        ("--kv-cache-gib", "0", "0<x<=1000000000.0"),
        ("--step-timeout", "0.01", "0.1<=x<=1000000000.0"),
        ("--max-model-len", "1", "2<=x<=2147483647"),
    ],
)
def test_numbers_that_no_node_takes_are_refused(option: str, value: str, bound: str) -> None:
    with pytest.raises(click.BadParameter) as caught:
        start.make_context("start", [option, value])
    said = caught.value.format_message()
    assert option in said and f"is not in the range {bound}" in said


def test_all_numbers_of_a_node_end_somewhere() -> None:
    for option in start.params:
        assert option.type is not click.INT and option.type is not click.FLOAT, option.name
        if isinstance(option.type, click.IntRange | click.FloatRange):
            assert option.type.max is not None, option.name


def test_a_batch_that_no_node_runs_is_refused() -> None:
    with pytest.raises(OptionError, match="--batch '1,999999': give sizes of 1 to 4096"):
        sizes_of("1,999999")


SIMULATE = ("simulate", "--arrivals", "poisson:9", "--requests", "2")


@pytest.mark.parametrize("words", [("--version",), ("--help",), SIMULATE, (*SIMULATE, "--json")])
def test_a_full_standard_output_is_said(words: tuple[str, ...]) -> None:
    assert said_when_full(*words) == "Error: standard output: No space left on device\n"


def said_when_full(*words: str) -> str:
    """Standard error of a command whose output finds no room on the disk."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [ALBIREO, *words], stdout=full, stderr=subprocess.PIPE, text=True, timeout=90
        )
    assert done.returncode == 1
    return done.stderr


@pytest.mark.parametrize("value", ["inf", "nan"])
@pytest.mark.parametrize(
    "words",
    [
        ("start", "--shutdown-timeout"),
        ("stop", "--timeout"),
        ("drain-group", "0", "--timeout"),
    ],
)  # fmt: skip
def test_what_is_no_finite_number_is_said(
    node_home: Path, words: tuple[str, ...], value: str
) -> None:
    ended = CliRunner().invoke(main, ["node", *words, value])
    assert ended.exit_code == 2 and f"{value} is not a finite number" in ended.output


@pytest.mark.parametrize(
    "words",
    [
        ("bench", "serve", "--request-rate"),
        ("bench", "serve", "--random-range-ratio"),
        ("bench", "prefix", "--shared"),
        ("top", "--interval"),
    ],
)
def test_nan_is_no_number(words: tuple[str, ...]) -> None:
    ended = CliRunner().invoke(main, [*words, "nan"])
    assert ended.exit_code == 2 and "nan is not a" in ended.output


@pytest.mark.parametrize(
    "words", [("node", "start", "--chat-template"), ("generate", "x", "--api-key-file")]
)
def test_a_file_that_is_no_text_is_said(
    node_home: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    path = tmp_path / "binary"
    path.write_bytes(b"\xff\xfe")
    ended = CliRunner().invoke(main, [*words, str(path)])
    assert ended.exit_code == 2 and f"{path} cannot be read: 'utf-8' codec" in ended.output


def test_digits_that_are_no_number_are_said(node_home: Path) -> None:
    ended = CliRunner().invoke(main, ["node", "restart-group", "²"])
    assert ended.exit_code == 2 and "'²' is neither a group's number nor" in ended.output


def test_following_a_log_ends_with_it(node_home: Path) -> None:
    path = Path(log_path("gone"))
    path.parent.mkdir(parents=True)
    path.write_text("its last words\n")
    threading.Timer(0.2, path.unlink).start()
    ended = CliRunner().invoke(main, ["node", "logs", "--follow", "--name", "gone"])
    assert (ended.exit_code, ended.output) == (0, "its last words\n")


@pytest.mark.node
def test_a_node_from_start_to_stop(node_home: Path, tiny_model_dir: Path) -> None:
    begun = albireo(
        "node", "start", "--model", str(tiny_model_dir), "--load-format", "dummy", "--device",
        "cpu", "--groups", "2x1", "--detach",
    )  # fmt: skip
    assert "ready in" in begun.stderr and "api.sock" in begun.stderr
    try:
        greedy = ("--max-tokens", "5", "--temperature", "0", "--ignore-eos")
        first = albireo("generate", "abc", *greedy).stdout
        assert first.startswith("abc") and first == albireo("generate", *greedy, text="abc").stdout
        assert albireo("chat", "--message", "hello", *greedy).stdout.strip() != ""
        refused = albireo("generate", "a", "--temperature", "-1", status=1)
        assert refused.stderr.startswith("Error: temperature must be") and refused.stdout == ""
        shown = albireo("node", "status").stdout
        assert "g1.worker0" in shown and "ready" in shown
        tree = json.loads(albireo("node", "status", "--json").stdout)
        assert [group["state"] for group in tree["groups"]] == ["ready", "ready"]
        assert "g0.worker0" in albireo("node", "logs").stdout
        for words in (
            ("generate", "abc", *greedy), ("node", "status"), ("node", "status", "--json"),
            ("node", "logs"), ("top", "--once"), ("top", "--json"),
        ):  # fmt: skip
            assert said_when_full(*words) == "Error: standard output: No space left on device\n"
        with subprocess.Popen(
            [ALBIREO, "generate", "abc", *greedy], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as unread:
            assert unread.stdout is not None and unread.stderr is not None
            unread.stdout.close()
            assert unread.stderr.read() == b"", "a reader that has enough is no error"
    finally:
        assert "has stopped" in albireo("node", "stop").stdout
    assert not is_running("default")


@pytest.mark.node
def test_bench_runtime(node_home: Path, tiny_model_dir: Path) -> None:
    words = ("bench", "runtime", "--model", str(tiny_model_dir), "--batch", "16", "--tokens", "60",
             "--step-ms", "4", "--json")  # fmt: skip
    result = json.loads(albireo(*words).stdout)
    assert result["tokens_checked"] == 16 * 60
    assert 0 < result["tokens_per_s"] <= 16 / 4e-3 * 1.05
    assert set(result["cpu_ms_per_step"]) >= {"router", "g0.scheduler", "g0.worker0", "(client)"}


@pytest.mark.node
def test_bench_throughput(node_home: Path, tiny_model_dir: Path) -> None:
    words = ("bench", "throughput", "--model", str(tiny_model_dir), "--load-format", "dummy",
             "--device", "cpu", "--batch", "1,4", "--input-len", "8", "--output-len", "8",
             "--repeats", "1", "--json")  # fmt: skip
    result = json.loads(albireo(*words).stdout)
    assert [row["batch"] for row in result["results"]] == [1, 4]
    assert all(row["tokens_per_s"] > 0 for row in result["results"])
