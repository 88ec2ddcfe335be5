"""The parts of `bench serve`: data sets, arrivals, figures."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
from pathlib import Path

import msgspec
import pytest

from albireo.bench.serving import DatasetError, DatasetOptions, LoadOptions, make_requests
from albireo.bench.serving.connection import Answer, Connections
from albireo.bench.serving.figures import METRICS, summary
from albireo.bench.serving.load import arrivals, run_load
from albireo.bench.serving.run import Run

from .played_server import DONE, chunked, playing, text


# ------------------------------------------------------------------ data sets
def test_random_prompts() -> None:
    options = DatasetOptions(num_prompts=50, input_len=100, output_len=20, ids=(10, 90))
    asked = make_requests(options)
    assert asked == make_requests(options)
    assert asked != make_requests(msgspec.structs.replace(options, seed=1))
    assert {(len(each.prompt), each.output_len) for each in asked} == {(100, 20)}
    assert len({tuple(each.prompt) for each in asked}) == 50
    drawn = {token for each in asked for token in each.prompt}
    assert drawn == set(range(10, 90))


def test_random_lengths_and_a_common_prefix() -> None:
    asked = make_requests(
        DatasetOptions(num_prompts=400, input_len=100, output_len=20, range_ratio=0.5, prefix_len=7)
    )
    lengths = [len(each.prompt) - 7 for each in asked]
    assert (min(lengths), max(lengths)) == (50, 150)
    assert {min(e.output_len for e in asked), max(e.output_len for e in asked)} == {10, 30}
    assert len({tuple(each.prompt[:7]) for each in asked}) == 1


def test_random_words() -> None:
    for each in make_requests(DatasetOptions(num_prompts=5, input_len=30, as_ids=False)):
        assert isinstance(each.prompt, str) and len(each.prompt.split()) == 30


def test_repeated_prefixes() -> None:
    asked = make_requests(
        DatasetOptions(
            name="prefix_repetition", num_prompts=40, num_prefixes=4, repeated_prefix_len=20,
            repeated_suffix_len=5, repeated_output_len=3,
        )
    )  # fmt: skip
    assert {(len(each.prompt), each.output_len) for each in asked} == {(25, 3)}
    prefixes = [tuple(each.prompt[:20]) for each in asked]
    assert [prefixes.count(each) for each in set(prefixes)] == [10] * 4
    assert len({tuple(each.prompt) for each in asked}) == 40


def test_sharegpt(tmp_path: Path) -> None:
    def talk(*turns: str) -> dict[str, object]:
        return {"id": "x", "conversations": [{"from": "human", "value": each} for each in turns]}

    path = tmp_path / "share.json"
    good = talk("q" * 40, "a" * 80, "more")
    path.write_text(
        json.dumps([good, talk("q" * 40), talk("hi", "a" * 80), talk("q" * 9000, "a" * 80)])
    )
    options = DatasetOptions(name="sharegpt", path=path, num_prompts=3)
    assert [(each.prompt, each.output_len) for each in make_requests(options)] == [
        ("q" * 40, 20)
    ] * 3
    options = msgspec.structs.replace(options, text_output_len=9)
    assert {each.output_len for each in make_requests(options)} == {9}


def test_custom(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "one"}\n\n{"prompt": "two", "output_len": 5, "more": 1}\n')
    options = DatasetOptions(name="custom", path=path, num_prompts=4, text_output_len=256)
    asked = sorted((each.prompt, each.output_len) for each in make_requests(options))
    assert asked == [("one", 256)] * 2 + [("two", 5)] * 2
    path.write_text('{"prompt": "one"}\n{"text": 1}\n')
    with pytest.raises(DatasetError, match="line 2"):
        make_requests(options)
    path.write_text("\n")
    with pytest.raises(DatasetError, match="no prompt"):
        make_requests(options)
    with pytest.raises(DatasetError, match="needs --dataset-path"):
        make_requests(DatasetOptions(name="custom"))
    with pytest.raises(DatasetError, match="there are none"):
        make_requests(DatasetOptions(ids=(5, 5)))


@pytest.mark.parametrize("name", ["sharegpt", "custom"])
def test_a_file_that_is_no_utf_8(name: str, tmp_path: Path) -> None:
    path = tmp_path / "latin"
    line = '{"prompt": "h\xe9", "conversations": [{"value": "h\xe9"}]}'
    path.write_text(f"[{line}]" if name == "sharegpt" else line, encoding="latin-1")
    with pytest.raises(DatasetError, match=r"'utf-8' codec"):
        make_requests(DatasetOptions(name=name, path=path))


# ------------------------------------------------------------------ load
@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_their_rate_and_burstiness(burstiness: float) -> None:
    """The gaps of a gamma process: mean 1 / rate, squared variation 1 / burstiness."""
    options = LoadOptions(request_rate=50.0, burstiness=burstiness, seed=3)
    times = list(itertools.islice(arrivals(options), 20_001))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = statistics.fmean(gaps)
    assert times[0] == 0 and mean == pytest.approx(1 / 50, rel=0.05)
    assert statistics.pvariance(gaps) / mean**2 == pytest.approx(1 / burstiness, rel=0.1)


def test_all_at_once() -> None:
    assert list(itertools.islice(arrivals(LoadOptions()), 5)) == [0.0] * 5


def test_never_more_at_once_than_allowed(tmp_path: Path) -> None:
    async def run(most: int | None) -> tuple[int, list[Answer]]:
        body = chunked(text("a", "length") + DONE)
        async with playing(tmp_path / f"s{most}", lambda _: [0.05, body]) as (played, target):
            requests = [target.request("POST", "/", b"%d" % number) for number in range(12)]
            ended: list[Answer] = []
            options = LoadOptions(max_concurrency=most)
            answers = await run_load(Connections(target), requests, options, ended.append)
            assert sorted(played.bodies, key=int) == [b"%d" % number for number in range(12)]
            assert len(ended) == 12 and all(due <= each.began for due, each in answers)
            return played.most_running, [each for _, each in answers]

    most, answers = asyncio.run(run(3))
    assert most == 3
    # What waits for others has not begun: no more than three are between beginning and end.
    moments = sorted([(each.began, 1) for each in answers] + [(each.last, -1) for each in answers])
    assert max(itertools.accumulate(change for _, change in moments)) == 3
    assert asyncio.run(run(None))[0] == 12


# ------------------------------------------------------------------ figures
def played(at: list[float], tokens: int | None = None, error: str | None = None) -> Answer:
    answer = Answer(stream=True)
    answer.began, answer.first, answer.last = 100.0, 100.0 + at[0], 100.0 + at[-1]
    answer.gaps = [b - a for a, b in itertools.pairwise(at)]
    answer.events = len(at)
    answer.completion_tokens = tokens
    answer.prompt_tokens = None if tokens is None else 10
    answer.error = error
    return answer


def test_figures() -> None:
    answers = [
        played([0.1, 0.2, 0.3], 3),
        played([0.3, 0.7], 5),
        played([0.2], 1),
        played([9.0, 19.0], 2, error="HTTP 500"),
    ]
    found = summary(answers, [1] * 4, 2.0, METRICS, (50, 99), {"ttft": 250, "tpot": 101})
    assert (found["completed"], found["failed"], found["tokens_counted_by"]) == (3, 1, "usage")
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 9)
    assert (found["request_throughput"], found["output_throughput"]) == (1.5, 4.5)
    assert found["total_token_throughput"] == 19.5
    assert (found["mean_ttft_ms"], found["median_ttft_ms"]) == (200.0, 200.0)
    # 0.2 s for 2 more tokens, 0.4 s for 4 more; the third has none.
    assert (found["mean_tpot_ms"], found["std_tpot_ms"]) == (100.0, 0.0)
    assert found["mean_itl_ms"] == 200.0 and found["p50_itl_ms"] == 100.0
    assert found["mean_e2el_ms"] == 400.0 and found["p99_e2el_ms"] == pytest.approx(692, abs=1)
    assert (found["good"], found["request_goodput"]) == (2, 1.0)


def test_an_answer_without_text_is_whole_but_not_good_and_has_no_times() -> None:
    empty = Answer(stream=True)
    empty.began, empty.last, empty.completion_tokens = 100.0, 100.1, 1
    found = summary([empty, played([0.1])], [1, 1], 1.0, METRICS, (99,), {"ttft": 250})
    assert (found["completed"], found["good"], found["mean_ttft_ms"]) == (2, 1, 100.0)
    assert Run({}, [(100.0, empty)], 100.0).details()["ttfts"] == [None]


def test_figures_without_usage() -> None:
    found = summary([played([0.1, 0.2])], [12], 1.0, ("tpot",), (99,), {})
    assert (found["tokens_counted_by"], found["total_output_tokens"]) == ("events", 2)
    assert found["total_input_tokens"] == 12 and found["mean_tpot_ms"] == 100.0
    assert "mean_ttft_ms" not in found and "good" not in found


def test_figures_of_nothing() -> None:
    found = summary([played([0.1], error="x")], [None], 1.0, METRICS, (99,), {})
    assert found["completed"] == 0 and "mean_ttft_ms" not in found
