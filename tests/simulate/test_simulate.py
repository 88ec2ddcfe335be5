"""`albireo simulate`: what it says, and that nothing of it is chance."""

from __future__ import annotations

import json
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo.cli.main import main
from albireo.scheduler.limits import Limits
from albireo.simulate.group import GroupShape
from albireo.simulate.histogram import Histogram
from albireo.simulate.profile import Profile, ProfileError, StepTimes, known_profiles, load_profile
from albireo.simulate.report import Figures
from albireo.simulate.shard import RemoteShard
from albireo.simulate.simulation import Simulation, _shares
from albireo.simulate.workload import Arrival, Prompts, arrival_rate


def simulate(*arguments: str) -> dict[str, Any]:
    ended = CliRunner().invoke(main, ["simulate", *arguments, "--json"])
    assert ended.exit_code == 0, ended.output
    return dict(json.loads(ended.stdout))


def write(path: Path, *lines: dict[str, Any]) -> str:
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


def test_one_request_by_hand(tmp_path: Path) -> None:
    """It finds the device idle: prefill is one step, and each further token another one."""
    trace = write(tmp_path / "trace", {"at": 1.0, "input_len": 32, "output_len": 4})
    tree = simulate("--trace", trace, "--profile", "sim:20")
    assert tree["requests"] == {"completed": 1, "refused": 0}
    assert tree["tenants"] == {}
    assert tree["ttft_ms"]["mean"] == pytest.approx(20)
    assert tree["tpot_ms"]["mean"] == tree["itl_ms"]["mean"] == pytest.approx(20)
    assert tree["e2e_ms"]["mean"] == pytest.approx(80)
    assert tree["virtual_s"] == pytest.approx(1.08)


def test_the_next_one_waits_for_the_steps_that_are_planned(tmp_path: Path) -> None:
    trace = write(
        tmp_path / "trace",
        {"at": 0.0, "input_len": 32, "output_len": 10},
        {"at": 0.05, "input_len": 32, "output_len": 1},
    )
    # At 50 ms step 3 runs and step 4 is planned; the prompt is in step 5, which ends at 100.
    tree = simulate("--trace", trace, "--profile", "sim:20")
    assert tree["ttft_ms"]["mean"] == pytest.approx((20 + 50) / 2)
    # Without plans ahead it is in step 4.
    tree = simulate("--trace", trace, "--profile", "sim:20", "--no-async-scheduling")
    assert tree["ttft_ms"]["mean"] == pytest.approx((20 + 30) / 2)


@pytest.mark.parametrize(("at", "ttft_ms"), [(0.06, 60), (0.075, 85)])
def test_behind_a_long_step_the_plan_waits_for_who_comes(
    tmp_path: Path, at: float, ttft_ms: float
) -> None:
    """Step 2 runs from 40 ms to 80, and step 3 is planned at 70."""
    trace = write(
        tmp_path / "trace",
        {"at": 0.0, "input_len": 32, "output_len": 10},
        {"at": at, "input_len": 32, "output_len": 1},
    )
    tree = simulate("--trace", trace, "--profile", "sim:40")
    assert tree["ttft_ms"]["mean"] == pytest.approx((40 + ttft_ms) / 2)


def test_the_same_again_is_the_same() -> None:
    arguments = ["--arrivals", "poisson:40", "--requests", "500", "--groups", "2x1"]
    one, other, third = (simulate(*arguments, "--seed", seed) for seed in ("1", "1", "2"))
    for tree in (one, other, third):
        del tree["wall_s"], tree["peak_memory_mib"]
    assert one == other != third
    assert one["requests"]["completed"] == 500


def test_any_number_of_processes_says_the_same() -> None:
    arguments = ["--arrivals", "load:1.2", "--requests", "300", "--groups", "1x2,2x1"]
    arguments += ["--kv-tokens", "4096", "--max-num-seqs", "32", "--prefix-len", "64"]
    trees = [simulate(*arguments, "--processes", str(number)) for number in (1, 2, 9)]
    for tree in trees:
        del tree["wall_s"], tree["peak_memory_mib"]
    assert trees[0] == trees[1] == trees[2]
    assert trees[0]["preemptions"] > 0 and trees[0]["requests"]["completed"] == 300


def test_processes_get_all_groups_and_the_router_s_own_fewer() -> None:
    for groups in range(1, 65):
        for processes in range(1, 9):
            shares = _shares(groups, processes)
            assert [number for share in shares for number in share] == list(range(groups))
            assert len(shares) == min(groups, processes)
            assert len(shares[0]) <= max(map(len, shares))


def test_a_process_that_dies_is_an_error_and_no_wait() -> None:
    shape = GroupShape(LIMITS, 1)
    shard = RemoteShard({0: shape}, load_profile("sim:1"), 4)
    try:
        shard.advance([], 1.0)
        assert shard.report().horizon == pytest.approx(1.001)
        shard._process.kill()
        with pytest.raises(RuntimeError, match="has ended with status -9"):
            shard.advance([], 2.0)
            shard.report()
    finally:
        shard.close()


def test_a_process_whose_simulation_is_gone_ends_without_a_word(
    capfd: pytest.CaptureFixture[str],
) -> None:
    shard = RemoteShard({0: GroupShape(LIMITS, 1)}, load_profile("sim:1"), 4)
    shard.advance([], 1.0)
    shard.report()
    shard._pipe.close()
    shard._process.join(30)
    assert shard._process.exitcode == 0
    assert capfd.readouterr().err == ""


LIMITS = Limits(
    max_num_seqs=4, max_num_batched_tokens=64, max_model_len=128, block_size=4, num_blocks=40,
    lookahead=1,
)  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(
    gaps=st.lists(st.sampled_from([0.0, 0.001, 0.01, 0.3, 1000.0]), min_size=1, max_size=40),
    lengths=st.randoms(use_true_random=False),
    lookahead=st.integers(0, 2),
    blocks=st.integers(32, 60),
    ranks=st.lists(st.sampled_from([1, 2]), min_size=1, max_size=4),
)
def test_whoever_comes_when_all_ends_are_known_before_they_are_needed(
    gaps: list[float], lengths: random.Random, lookahead: int, blocks: int, ranks: list[int]
) -> None:
    """The simulation and its groups raise RuntimeError where that is not so."""
    at, arrivals = 0.0, []
    for gap in gaps:
        at += gap
        arrivals.append(
            Arrival(
                at=at, input_len=lengths.randint(1, 80), output_len=lengths.choice([1, 2, 20, 40]),
                tenant=lengths.choice("ab"), priority=lengths.choice([0, 0, 1]),
            )
        )  # fmt: skip
    limits = replace(LIMITS, lookahead=lookahead, num_blocks=blocks)
    figures = Figures({})
    profile = load_profile("h100-qwen3-8b")
    if lengths.random() < 0.3:  # many rows are quicker than few: odd, and allowed
        profile = msgspec.structs.replace(profile, rows_ms=(9.0, 8.0, 0.2, 5.0, 6.0))
    Simulation(
        [GroupShape(limits, each) for each in ranks], len(gaps), profile, iter(arrivals), 0, figures
    ).run()
    tree = figures.tree(at, 0.0)
    assert tree["requests"] == {"completed": len(gaps), "refused": 0}
    assert figures.tokens == sum(each.output_len for each in arrivals)
    shortest = StepTimes(profile, range(69), 2).least_s * 1e3
    assert tree["ttft_ms"]["p50"] > shortest
    # Each waits at most for all the others, one after the other.
    longest = sum((each.output_len + 3) * 0.02 for each in arrivals) * 4
    assert tree["e2e_ms"]["p99"] < longest * 1e3


def test_tenants_are_treated_as_on_a_node(tmp_path: Path) -> None:
    one = [{"at": 0.0, "input_len": 64, "output_len": 8, "tenant": "one", "prefix": "p",
            "prefix_len": 64} for _ in range(8)]  # fmt: skip
    other = [line | {"tenant": "other", "at": 0.4} for line in one]
    trace = write(tmp_path / "trace", *one, *other)
    arguments = ["--trace", trace, "--profile", "sim:20", "--max-num-seqs", "8"]
    alike = simulate(*arguments)
    assert alike["requests"] == {"completed": 16, "refused": 0}
    assert alike["prefix_hit_share"] > simulate(*arguments, "--isolate-tenants")["prefix_hit_share"]
    limited = simulate(*arguments, "--max-num-reqs-per-tenant", "3")
    assert limited["requests"] == {"completed": 6, "refused": 10}
    # All at once now, one at a time: who weighs more waits less.
    trace = write(tmp_path / "trace", *(line | {"at": 0.0} for line in one + other))
    arguments = ["--trace", trace, "--profile", "sim:20", "--max-num-seqs", "1"]
    for weights, quicker in (("one=1000", "one"), ("one=0.001", "other")):
        tenants = simulate(*arguments, "--tenant-weights", weights)["tenants"]
        assert [each["completed"] for each in tenants.values()] == [8, 8]
        means = {name: each["ttft_ms"]["mean"] for name, each in tenants.items()}
        assert means[quicker] == min(means.values()) < max(means.values()) / 1.5


def test_a_flood_makes_others_wait_for_the_steps_that_are_planned_and_no_longer(
    tmp_path: Path,
) -> None:
    """A thousand requests of one client at once, and one a second of another."""
    flood = [{"at": 0.5, "input_len": 64, "output_len": 200, "tenant": "flood"}] * 1000
    quiet = [
        {"at": second + second * 0.0031, "input_len": 64, "output_len": 16, "tenant": "quiet"}
        for second in range(1, 16)
    ]
    arguments = ["--profile", "sim:20"]
    alone = simulate("--trace", write(tmp_path / "quiet", *quiet), *arguments)
    beside = simulate("--trace", write(tmp_path / "both", *flood, *quiet), *arguments)
    assert beside["requests"]["completed"] == 1015 and beside["virtual_s"] > 16
    least = alone["tenants"]["quiet"]["ttft_ms"]["mean"]
    assert least == pytest.approx(20)
    # What is left of one step, the planned one, and its own: within the histogram's 1%.
    assert beside["tenants"]["quiet"]["ttft_ms"]["p99"] <= 3 * least * 1.01


def test_ranks_share_a_step_and_exchange_something() -> None:
    arguments = ["--arrivals", "poisson:1", "--requests", "10"]
    one, two, constant = (
        simulate(*arguments, "--groups", groups, "--profile", profile)["tpot_ms"]["mean"]
        for groups, profile in (
            ("1x1", "h100-qwen3-8b"),
            ("1x2", "h100-qwen3-8b"),
            ("1x2", "sim:9"),
        )
    )
    parallel_ms = load_profile("h100-qwen3-8b").parallel_us / 1e3
    assert two == pytest.approx(one / 2 + parallel_ms, rel=0.01)
    assert constant == pytest.approx(9)


def test_constant_steps_can_have_a_way_to_go(tmp_path: Path) -> None:
    trace = write(tmp_path / "trace", {"at": 0.0, "input_len": 8, "output_len": 3})
    tree = simulate("--trace", trace, "--profile", "sim:20:3")
    assert tree["ttft_ms"]["mean"] == pytest.approx(23)
    assert tree["tpot_ms"]["mean"] == pytest.approx(20)
    for name in ("sim:20:x", "sim:20:-1", "sim:inf", "sim:nan", "sim:20:"):
        with pytest.raises(ProfileError, match=r"such as sim:20:2\.5"):
            load_profile(name)


def test_a_profile_of_one_s_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"name": "mine", "rows": [1, 8], "rows_ms": [10, 24], "input_ms": 5}')
    line = {"at": 0.0, "input_len": 8, "output_len": 3}
    tree = simulate("--trace", write(tmp_path / "trace", line), "--profile", str(path))
    assert tree["simulate"] == "mine"
    assert tree["ttft_ms"]["mean"] == pytest.approx(5 + 24)
    assert tree["tpot_ms"]["mean"] == pytest.approx(10)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"name": "x", "rows": [1], "rows_ms": []}', "as many rows as rows_ms"),
        ('{"name": "x", "rows": [2, 1], "rows_ms": [1, 2]}', "not in ascending order"),
        ('{"name": "x", "rows": [1], "rows_ms": [0]}', "must be above 0"),
        ('{"name": "x", "rows": [1], "rows_ms": [1], "pair_ns": -1}', ">= 0"),
        ('{"name": "x", "rows": [1], "rows_ms": [1], "colour": 1}', "unknown field"),
    ],
)
def test_a_profile_that_makes_no_sense_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ProfileError, match=reason):
        load_profile(str(path))


def test_prefixes_preemptions_and_goodput_are_counted() -> None:
    arguments = ["--arrivals", "poisson:200", "--requests", "400", "--groups", "2x1"]
    arguments += ["--prefix-len", "192", "--prefixes", "4"]
    tree = simulate(*arguments)
    assert 0.5 < tree["prefix_hit_share"] < 0.75  # 192 of 256 tokens, but the first ones
    assert simulate(*arguments, "--no-enable-prefix-caching")["prefix_hit_share"] == 0
    tight = simulate(*arguments, "--kv-tokens", "4096", "--slo", "ttft:1,tpot:1000")
    assert tight["preemptions"] > 0 and tight["requests"]["completed"] == 400
    assert tight["goodput"]["share"] == 0
    # All answers are of one length: the gaps, pauses of the preempted too, are what lies between.
    assert tight["itl_ms"]["mean"] == pytest.approx(tight["tpot_ms"]["mean"], abs=2e-3)
    assert simulate(*arguments, "--slo", "ttft:60000")["goodput"]["share"] == 1


@pytest.mark.parametrize(("swap_block_us", "swaps"), [(40.0, True), (60.0, False)])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_what_is_swapped_as_they_share_what_is_computed(
    ranks: int, swap_block_us: float, swaps: bool
) -> None:
    """So it is as cheap beside the 100 us for which one rank computes a block."""
    profile = Profile(
        name="mine", rows=(1,), rows_ms=(0.01,), prefill_token_us=25.0, swap_block_us=swap_block_us
    )
    limits = replace(LIMITS, num_swap_blocks=100)
    arrivals = (Arrival(at=0.0, input_len=20, output_len=40) for _ in range(12))
    figures = Figures({})
    Simulation([GroupShape(limits, ranks)], 12, profile, arrivals, 0, figures).run()
    (group,) = figures._groups
    assert group.counters.preemptions > 0
    assert (group.counters.swapped_out_blocks > 0) == swaps


def test_what_finds_no_room_is_refused(tmp_path: Path) -> None:
    lines = [{"at": 0.0, "input_len": 8, "output_len": 4} for _ in range(10)]
    trace = write(tmp_path / "trace", *lines)
    tree = simulate("--trace", trace, "--max-num-seqs", "2", "--max-num-queued-reqs", "3")
    assert tree["requests"] == {"completed": 5, "refused": 5}
    assert tree["goodput"]["share"] == 0.5, "what was refused was not good"


def test_a_plot(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    simulate("--arrivals", "poisson:50", "--requests", "50", "-o", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_written_costs_no_result(tmp_path: Path) -> None:
    (tmp_path / "plot.png").mkdir()
    words = ["--arrivals", "poisson:50", "--requests", "50", "-o", str(tmp_path / "plot.png")]
    ended = CliRunner().invoke(main, ["simulate", *words])
    assert ended.exit_code == 1 and "the plot cannot be written" in ended.output
    assert "50 requests on 1 groups" in ended.output


@given(st.lists(st.floats(1e-5, 1e3), min_size=1, max_size=60), st.sampled_from([1, 50, 99, 100]))
def test_percentiles_are_within_one_percent(values: list[float], percent: int) -> None:
    one, all_at_once = Histogram(), Histogram()
    for value in values:
        one.add(value)
    all_at_once.add_all(np.array(values))
    expected = float(np.percentile(values, percent, method="inverted_cdf"))
    for found in (one, all_at_once):
        assert found.percentile(percent) == pytest.approx(expected, rel=0.011)
        assert found.mean == pytest.approx(float(np.mean(values)))
    assert all_at_once.curve()[1][-1] == 1


def test_the_profile_of_the_h100_is_what_was_measured() -> None:
    """docs/performance.md: decodes at a context of 320, prompts, a mixed step, and two ranks."""
    profile = load_profile("h100-qwen3-8b")
    times = StepTimes(profile, range(10_001))
    for batch, step_ms in ((1, 4.30), (64, 5.64), (128, 7.24), (256, 10.66)):
        assert times.step_s(batch, batch * 320, 0, 0) * 1e3 == pytest.approx(step_ms, rel=0.01)
    for prompts, length, prompt_ms in ((4, 2048, 196.1), (1, 8192, 232.5)):
        pairs = prompts * length * length // 2
        found = times.step_s(prompts * length, 0, pairs, 0)
        assert found * 1e3 == pytest.approx(prompt_ms, rel=0.01)
    mixed = times.step_s(64 + 512, 64 * 320, 512 * 256, 0)
    assert mixed * 1e3 == pytest.approx(15.99, rel=0.05)
    two_ranks = StepTimes(profile, range(10_001), ranks=2)
    for batch, step_ms in ((1, 2.80), (64, 3.60), (128, 4.80), (256, 6.94)):
        assert two_ranks.step_s(batch, batch * 320, 0, 0) * 1e3 == pytest.approx(step_ms, rel=0.11)


def test_the_examples_of_the_documentation(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "simulation.md").read_text()
    trace, profile = (block.split("```")[0] for block in text.split("```json\n")[1:])
    (tmp_path / "trace").write_text(trace)
    (tmp_path / "mine.json").write_text(profile)
    tree = simulate("--trace", str(tmp_path / "trace"), "--profile", str(tmp_path / "mine.json"))
    assert tree["simulate"] == "mine" and tree["requests"]["completed"] == 3


def test_every_profile_of_the_package_can_be_read() -> None:
    assert "h100-qwen3-8b" in known_profiles()
    for name in known_profiles():
        profile = load_profile(name)
        assert profile.name == name and profile.source
        assert list(profile.rows) == sorted(profile.rows)


def test_a_load_is_a_share_of_what_all_slots_serve() -> None:
    profile = load_profile("sim:20")
    # 64 slots, each of which serves an answer of 10 steps of 20 ms in 0.2 s.
    assert arrival_rate("load:0.5", profile, (1, 4), 32, 8, 10) == pytest.approx(0.5 * 64 / 0.2)


def test_the_load_of_long_prompts_takes_no_memory() -> None:
    profile = load_profile("h100-qwen3-8b")
    tracemalloc.start()
    try:
        assert 0 < arrival_rate("load:0.5", profile, (1, 2), 256, 1 << 20, 64) < 0.1
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_prompts_share_what_they_are_to_share() -> None:
    prompts = Prompts(3)
    asked = Arrival(at=0, input_len=20, output_len=1, prefix="a", prefix_len=12)
    one, other = prompts.of(asked), prompts.of(asked)
    assert one[:12] == other[:12] and one[12:] != other[12:]
    assert len(one) == 20 and Prompts(3).of(asked) == one
