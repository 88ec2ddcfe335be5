"""The options of `albireo node start` that are about HTTP, and the bench of the gateway."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from albireo.bench.gateway import bench_gateway
from albireo.cli.network_options import http_address
from albireo.cli.start import start
from albireo.node.options import NodeOptions, OptionError, parse_weights


def test_http_is_one_option_or_two() -> None:
    assert http_address(None, None, None) is None
    assert http_address("a:1", None, None) == "a:1"
    assert http_address(None, "0.0.0.0", None) == "0.0.0.0:8000"
    assert http_address(None, None, 9) == "127.0.0.1:9"
    assert http_address(None, "::1", 9) == "[::1]:9"
    with pytest.raises(OptionError, match="the one or the others"):
        http_address("a:1", None, 9)


def test_no_gateway_runs_unless_http_is_asked_for() -> None:
    assert NodeOptions(gateways=4).num_gateways == 0
    assert NodeOptions(gateways=4, http=":1").num_gateways == 4
    assert NodeOptions(gateways=4, uds="/s").num_gateways == 4


def test_weights_are_names_and_numbers() -> None:
    assert parse_weights("") == {}
    assert parse_weights("alice=4, a=b=0.5,") == {"alice": 4.0, "a=b": 0.5}
    for text in ("alice", "=1", "alice=0", "alice=x", "alice=2000", "alice=nan", "alice=inf"):
        with pytest.raises(OptionError, match="is not TENANT=WEIGHT"):
            parse_weights(text)
    with pytest.raises(OptionError, match="'a' is there twice"):
        parse_weights("a=1,a=2")


def test_what_is_said_of_tenants_reaches_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[NodeOptions] = []

    def run(options: NodeOptions, _: object) -> int:
        given.append(options)
        return 0

    monkeypatch.setattr("albireo.node.launch.run_foreground", run)
    arguments = ["--tenant-weights", "alice=4", "--isolate-tenants"]
    done = CliRunner().invoke(start, [*arguments, "--max-num-reqs-per-tenant", "7"])
    assert done.exit_code == 0, done.output
    [options] = given
    assert (options.tenant_weights, options.isolate_tenants) == ({"alice": 4.0}, True)
    assert options.max_num_reqs_per_tenant == 7
    done = CliRunner().invoke(start, ["--tenant-weights", "alice=-1"])
    assert done.exit_code == 1 and "is not TENANT=WEIGHT" in done.output


def test_help_lists_the_options() -> None:
    text = CliRunner().invoke(start, ["--help"]).output
    for name in ("--http", "--host", "--port", "--uds", "--gateways", "--api-key",
                 "--api-key-file", "--allowed-origins", "--tenant-weights",
                 "--isolate-tenants", "--served-model-name", "--stream-interval",
                 "--seed", "--enable-chunked-prefill"):  # fmt: skip
        assert name in text


def test_prompts_are_always_computed_in_chunks() -> None:
    done = CliRunner().invoke(start, ["--no-enable-chunked-prefill"])
    assert done.exit_code == 2 and "--max-num-batched-tokens" in done.output


@pytest.mark.node
@pytest.mark.parametrize(("chat", "uds"), [(True, False), (False, True)])
def test_the_bench_counts_every_token(
    node_home: Path, tiny_model_dir: Path, chat: bool, uds: bool
) -> None:
    options = NodeOptions(model=str(tiny_model_dir), sim_step_ms=2.0)
    result = bench_gateway(options, 8, 60, chat=chat, uds=uds)
    assert result["transport"] == ("unix" if uds else "tcp")
    # The kernel counts in 10 ms: so short a run may show nothing.
    assert 0 <= result["gateway_us_per_event"] < 5000
    assert 0 < result["events"] <= 8 * 61
    assert "gateway0" in result["cpu_share_of_a_core"]
