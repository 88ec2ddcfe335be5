"""`albireo profile`: what was measured comes back, and what says too little is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from albireo.cli.main import main
from albireo.simulate.profile import StepTimes, load_profile

TIMES = StepTimes(load_profile("h100-qwen3-8b"), range(10_001))
SAME = {"shape": "qwen3-8b", "device": "cuda", "dtype": "bfloat16", "groups": [1]}
noise = random.Random(3)


def step(input_len: int, *batches: int, error: float = 0.0) -> dict[str, Any]:
    """A result of `bench step`, as long as the profile of the H100 says, more or less."""
    rows = [
        {
            "batch": batch,
            "step_ms_median": TIMES.step_s(batch, batch * (input_len + 64), 0, 0)
            * 1e3
            * (1 + noise.uniform(-error, error)),
        }
        for batch in batches
    ]
    return {"bench": "step", "input_len": input_len, "output_len": 128, "results": rows} | SAME


def prefill(*prompts: tuple[int, int]) -> dict[str, Any]:
    rows = []
    for count, length in prompts:
        step_s = TIMES.step_s(count * length, 0, count * length * length // 2, 0)
        rows.append({"prompts": count, "tokens": length, "ms": step_s * 1e3})
    return {"bench": "prefill", "prompts": rows} | SAME


def fit(path: Path, *benches: Any) -> Any:
    files = []
    for number, bench in enumerate(benches):
        files.append(path / f"{number}.json")
        files[-1].write_text(bench if isinstance(bench, str) else json.dumps(bench))
    out = path / "fitted.json"
    return CliRunner().invoke(main, ["profile", *map(str, files), "-o", str(out)])


@pytest.mark.parametrize("error", [0.0, 0.01])
def test_steps_that_were_not_measured_are_foretold(tmp_path: Path, error: float) -> None:
    batches = 1, 64, 128, 256
    benches = [step(length, *batches, error=error) for length in (256, 2048, 4096)]
    done = fit(tmp_path, *benches, prefill((4, 2048), (1, 8192)))
    assert done.exit_code == 0, done.output
    fitted = load_profile(str(tmp_path / "fitted.json"))
    assert "12 decode steps and 2 prompts" in fitted.source
    times = StepTimes(fitted, range(10_001))
    for rows, kv_tokens, pairs in ((32, 32_000, 0), (200, 700_000, 0), (4096, 0, 2 * 2048**2)):
        expected = TIMES.step_s(rows, kv_tokens, pairs, 0)
        assert times.step_s(rows, kv_tokens, pairs, 0) == pytest.approx(
            expected, rel=max(1e-3, 2 * error)
        )


def test_one_context_and_no_prompts_are_enough_for_rows(tmp_path: Path) -> None:
    assert fit(tmp_path, step(256, 8, 1)).exit_code == 0
    fitted = load_profile(str(tmp_path / "fitted.json"))
    assert fitted.rows == (1, 8) and fitted.kv_token_ns == fitted.prefill_token_us == 0
    assert fitted.rows_ms[0] == pytest.approx(TIMES.step_s(1, 320, 0, 0) * 1e3, rel=1e-3)


@pytest.mark.parametrize(
    ("benches", "reason"),
    [
        ([prefill((1, 8192))], "no result of `bench step --json` is among them"),
        ([step(8, 1), prefill((1, 8)) | {"dtype": "float32"}], "of different things"),
        ([{"bench": "step"}], "this is no result of"),
        (["nothing"], "0.json is no JSON, as `bench step --json`"),
        (
            [step(256, 1) | {"results": [{"batch": 1, "step_ms_median": ms}], "input_len": n}
             for n, ms in ((64, 0.001), (4096, 9.0), (4097, 0.002))],
            "too unsteady",
        ),
    ],
)  # fmt: skip
def test_what_says_too_little_is_refused(tmp_path: Path, benches: list[Any], reason: str) -> None:
    done = fit(tmp_path, *benches)
    assert done.exit_code == 1 and reason in done.output, done.output
