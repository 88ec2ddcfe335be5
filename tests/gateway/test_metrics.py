"""/metrics, as Prometheus reads it."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from albireo.gateway.metrics import exposition

from .played import MODEL, status_tree


def samples(tree: dict[str, Any]) -> dict[tuple[str, str], float]:
    """(name, group) -> value of the samples."""
    found = {}
    for family in text_string_to_metric_families(exposition(tree).decode()):
        for each in family.samples:
            found[each.name, each.labels.get("group", "")] = each.value
    return found


def test_the_names_that_dashboards_know() -> None:
    tree = status_tree()
    tree["groups"][0]["scheduler"] |= {"prefix_queried_tokens": 8, "prefix_hit_tokens": 4}
    tree["groups"][0]["finished"] = {"stop": 5}
    found = samples(tree)
    assert found["albireo:num_requests_running", "0"] == 3
    assert found["albireo:num_requests_waiting", "0"] == 1
    assert found["albireo:kv_cache_usage_perc", "0"] == 0.5
    assert found["albireo:num_preemptions_total", "0"] == 2
    assert found["albireo:prompt_tokens_total", "0"] == 40
    assert found["albireo:generation_tokens_total", "0"] == 60
    assert found["albireo:prefix_cache_queries_total", "0"] == 8
    assert found["albireo:prefix_cache_hits_total", "0"] == 4
    assert found["albireo:request_failure_total", ""] == 2
    assert found["albireo:request_success_total", "0"] == 5
    assert (found["albireo:group_up", "0"], found["albireo:group_up", "1"]) == (1, 0)
    assert ("albireo:num_requests_running", "1") not in found


def test_stages_have_their_mean_their_p99_and_what_is_exposed() -> None:
    tree = status_tree()
    task = {"mean_us": 20.0, "p99_us": 30.0, "exposed_us": 5.0}
    tree["groups"][0]["stages"] = {
        "serial_fraction": 0.25, "idle_us_mean": 7.0,
        **dict.fromkeys(("schedule", "input", "forward", "sample", "output"), task),
    }  # fmt: skip
    found = samples(tree)
    assert found["albireo:stage_time_mean_seconds", "0"] == 20e-6
    assert found["albireo:stage_time_p99_seconds", "0"] == 30e-6
    assert found["albireo:stage_exposed_mean_seconds", "0"] == 5e-6
    assert found["albireo:serial_fraction", "0"] == 0.25


def test_every_sample_of_the_groups_names_the_model() -> None:
    for family in text_string_to_metric_families(exposition(status_tree()).decode()):
        for each in family.samples:
            assert each.labels.get("model_name") == MODEL or "actor" in each.labels


def test_latencies_are_cumulative_histograms() -> None:
    tree = status_tree()
    tree["groups"][0]["latencies"] = {
        "time_to_first_token_seconds": {"bounds": [0.1, 1.0], "counts": [2, 3, 1], "sum": 4.5}
    }
    text = exposition(tree).decode()
    family = next(
        each for each in text_string_to_metric_families(text)
        if each.name == "albireo:time_to_first_token_seconds"
    )  # fmt: skip
    values = {(s.name.rpartition("_")[2], s.labels.get("le")): s.value for s in family.samples}
    assert values == {
        ("bucket", "0.1"): 2, ("bucket", "1.0"): 5, ("bucket", "+Inf"): 6,
        ("count", None): 6, ("sum", None): 4.5,
    }  # fmt: skip


def test_a_scrape_of_a_large_node_takes_less_than_5_ms() -> None:
    tree = status_tree()
    tree["groups"] = [tree["groups"][0] | {"group": number} for number in range(8)]
    best = 1.0
    for _ in range(5):
        began = time.perf_counter()
        exposition(tree)
        best = min(best, time.perf_counter() - began)
    assert best < 0.005
