"""Draining and stopping: what is in flight may finish, and everybody gets a last word."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from albireo.ipc.messages import Abort, Credit, Drain, Drained, EncodeText, GroupDown, Submit
from albireo.router import actors

from .conftest import Neighbourhood
from .fakes import RawClient, RouterThread, make_spec, piece
from .test_groups import wait_for_states

Start = Callable[..., Neighbourhood]


def test_draining_refuses_the_new_and_lets_the_old_finish(start: Start) -> None:
    near = start()
    group = near.group()
    supervisor = near.supervisor()
    client = near.client()
    client.send(type="generate", id=1, prompt_ids=[5])
    request = group.expect(Submit).request
    supervisor.send(Drain(30.0, -1, 5))
    draining = False
    while not draining:
        client.send(type="status", id=3)
        draining = client.receive()["status"]["draining"]
    client.send(type="generate", id=2, prompt_ids=[5])
    error = client.expect_error("unavailable", 2)
    assert error["retry"] and "shutting down" in error["message"]
    assert supervisor.silent()
    group.output(piece(request, 0, [1], "a", "stop"))
    assert client.receive()["items"][0][0] == 1
    assert supervisor.expect(Drained) == Drained(0, 5)
    assert isinstance(group.next(), Credit)


def test_when_the_time_is_over_the_rest_is_ended(start: Start) -> None:
    near = start()
    group = near.group()
    tokenizer = near.tokenizer()
    supervisor = near.supervisor()
    client = near.client()
    client.send(type="generate", id=1, prompt_ids=[5])
    client.send(type="tokenize", id=2, text="a")
    request = group.expect(Submit).request
    tokenizer.expect(EncodeText)
    supervisor.send(Drain(0.05, -1, 5))
    assert supervisor.expect(Drained) == Drained(2, 5)
    assert group.expect(Abort).request == request
    client.expect_error("unavailable", 1)
    client.expect_error("unavailable", 2)


def test_an_idle_router_is_drained_at_once(start: Start) -> None:
    near = start()
    supervisor = near.supervisor()
    began = time.monotonic()
    supervisor.send(Drain(30.0, -1, 5))
    assert supervisor.expect(Drained) == Drained(0, 5)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("times", [1, 2])
def test_a_stopped_router_ends_requests_and_leaves_no_socket(runtime_dir: Path, times: int) -> None:
    for _ in range(times):
        router = RouterThread(make_spec(runtime_dir))
        client = RawClient(router)
        client.send(type="generate", id=1, prompt_ids=[5])
        client.send(type="models", id=2)
        client.receive()
        router.stop()
        assert client.expect_error("unavailable", 1)["retry"]
        assert "shutting down" in client.expect_error("unavailable", None)["message"]
        client.expect_close()
        client.close()
        assert not Path(router.path).exists()


def test_the_socket_of_a_dead_router_is_replaced_and_only_the_owner_may_connect(
    runtime_dir: Path,
) -> None:
    (runtime_dir / "api.sock").write_text("left behind")
    router = RouterThread(make_spec(runtime_dir))
    assert Path(router.path).stat().st_mode & 0o777 == 0o600
    RawClient(router).close()
    router.stop()


def test_a_draining_group_gets_nothing_new_and_says_when_it_is_empty(start: Start) -> None:
    near = start(num_groups=2)
    first, second = near.group(0), near.group(1)
    supervisor, client = near.supervisor(), near.client()
    supervisor.topology("ready", "ready")
    wait_for_states(client, "ready", "ready")
    client.send(type="generate", id=1, prompt_ids=[5])
    request = first.expect(Submit).request
    supervisor.topology("draining", "ready")
    supervisor.send(Drain(30.0, 0, 7))
    wait_for_states(client, "draining", "ready")
    for number in (2, 3, 4):
        client.send(type="generate", id=number, prompt_ids=[5])
        second.expect(Submit)
    assert supervisor.silent()
    first.output(piece(request, 0, [1], "a", "stop"))
    assert supervisor.expect(Drained) == Drained(0, 7)


def test_what_a_group_has_not_finished_in_time_goes_on_elsewhere(start: Start) -> None:
    near = start(num_groups=2, max_failovers=0)
    first, second = near.group(0), near.group(1)
    supervisor, client = near.supervisor(), near.client()
    supervisor.topology("ready", "ready")
    wait_for_states(client, "ready", "ready")
    client.send(type="generate", id=1, prompt_ids=[5])
    request = first.expect(Submit).request
    first.output(piece(request, 0, [1], "a"))
    assert client.receive()["items"][0][1] == 0
    supervisor.topology("draining", "ready")
    supervisor.send(Drain(0.05, 0, 7))
    assert supervisor.expect(Drained) == Drained(1, 7)
    supervisor.send(GroupDown(0, 0, "it was ended on request", planned=True))
    again = second.expect(Submit)
    assert (again.prompt_ids, again.resumed) == ([5, 1], 1)


@pytest.mark.parametrize("heard", [["drain", "down"], ["drain"], ["down", "drain"]])
def test_a_group_that_has_died_is_drained_however_soon_it_is_back(
    start: Start, monkeypatch: pytest.MonkeyPatch, heard: list[str]
) -> None:
    """Before the next tick; it may be back before its death is heard of, or have died before the
    order came."""
    monkeypatch.setattr(actors, "TICK_S", 60.0)
    near = start(max_failovers=2)
    first, supervisor, client = near.group(), near.supervisor(), near.client()
    wait_for_states(client, "ready")
    client.send(type="generate", id=1, prompt_ids=[5])
    first.expect(Submit)
    for each in heard:
        if each == "drain":
            supervisor.topology("draining")
            supervisor.send(Drain(60.0, 0, 7))
        else:
            supervisor.send(GroupDown(0, 0, "its worker was killed"))
    supervisor.topology("restarting")
    wait_for_states(client, "restarting")
    second = near.group(0, incarnation=1)
    assert second.expect(Submit).prompt_ids == [5]
    assert supervisor.expect(Drained) == Drained(0, 7)
