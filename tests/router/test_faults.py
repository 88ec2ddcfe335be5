"""A fault inside the router: whoever asked has an end, and a router without memory is none."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from albireo.ipc.actor import EXIT_FAILED
from albireo.ipc.messages import Credit, Submit
from albireo.router import delivery
from albireo.router import session as session_module
from albireo.router.delivery import Delivery
from albireo.router.router import Router

from .conftest import Neighbourhood
from .fakes import WAIT_S, FakeGroup, RawClient, piece
from .test_process import RouterProcess

Start = Callable[..., Neighbourhood]


def fails_once(found: Any, error: Exception, when: Callable[..., bool] = lambda *_: True) -> Any:
    """The same function, which raises once."""
    raised = []

    def function(*arguments: Any) -> Any:
        if not raised and when(*arguments):
            raised.append(True)
            raise error
        return found(*arguments)

    return function


def in_flight(client: RawClient) -> int:
    client.send(type="status", id=9999)
    count: int = client.receive()["status"]["requests"]["in_flight"]
    return count


def outstanding_tokens(client: RawClient) -> int:
    client.send(type="status", id=9999)
    tokens: int = client.receive()["status"]["groups"][0]["outstanding_tokens"]
    return tokens


def test_a_request_that_was_taken_when_it_failed(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = start()
    group, client = near.group(), near.client()
    faulty = fails_once(Router.submit_all, ValueError("a fault of this test"))
    monkeypatch.setattr(Router, "submit_all", faulty)
    client.send(type="generate", id=1, prompt_ids=[5])
    client.expect_error("internal", 1)
    assert in_flight(client) == 0
    client.send(type="generate", id=1, prompt_ids=[5])
    group.output(piece(group.expect(Submit).request, 0, [7], "a", "stop"))
    assert client.receive_deltas(1)


def test_a_batch_that_cannot_be_handed_on(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    near = start()
    group, client = near.group(), near.client()
    for number in (1, 2):
        client.send(type="generate", id=number, prompt_ids=[5])
    first, second = (group.expect(Submit).request for _ in range(2))
    faulty = fails_once(Delivery.output, ValueError("a fault of this test"))
    monkeypatch.setattr(Delivery, "output", faulty)
    group.output(piece(first, 0, [7], "a", "stop"))
    client.expect_error("internal", 1)
    while not isinstance(group.next(), Credit):
        pass  # else the group had one less for ever
    group.output(piece(second, 0, [7], "b", "stop"))
    assert client.receive_deltas(2)[0][3] == "b"
    assert in_flight(client) == 0


def test_of_a_batch_that_is_half_handed_on_the_group_keeps_no_load(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would look busier than it is for as long as it lives."""
    near = start()
    group, client = near.group(), near.client()
    for number in (1, 2):
        client.send(type="generate", id=number, prompt_ids=[5], params={"max_tokens": 50})
    first, second = (group.expect(Submit).request for _ in range(2))
    faulty = fails_once(delivery.Delta, ValueError("a fault of this test"))
    monkeypatch.setattr(delivery, "Delta", faulty)
    group.output(piece(first, 0, [7] * 20, "a"))
    client.expect_error("internal", 1)
    assert outstanding_tokens(client) == 51
    group.output(piece(second, 0, [7], "b"))
    assert client.receive()["items"]
    assert outstanding_tokens(client) == 50


def test_a_fault_behind_the_ends_of_answers(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both answers are whole, and nothing of either is left."""
    monkeypatch.setattr(
        Router, "_finished", fails_once(Router._finished, ValueError("a fault of this test"))
    )
    near = start()
    group, client = near.group(), near.client()
    for number in (1, 2):
        client.send(type="generate", id=number, prompt_ids=[5])
    first, second = (group.expect(Submit).request for _ in range(2))
    group.output(piece(first, 0, [7], "a", "stop"), piece(second, 0, [7], "b", "stop"))
    items = client.receive()["items"]
    assert [(item[0], item[3]) for item in items] == [(1, "a"), (2, "b")]
    client.expect_error("internal", 1)
    assert in_flight(client) == 0
    assert outstanding_tokens(client) == 0


def test_faults_behind_two_ends_are_of_these_two_alone(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third answer ends, its group is told once, and the next batch is of another group."""
    found, faults = Router._finished, [1, 2]

    def faulty(router: Router, stream: Any, group: Any) -> None:
        if stream.client_id in faults:
            raise ValueError("a fault of this test")
        found(router, stream, group)

    monkeypatch.setattr(Router, "_finished", faulty)
    near = start(num_groups=2)
    groups, client = [near.group(0), near.group(1)], near.client()
    requests: list[tuple[FakeGroup, int]] = []
    for number in range(1, 7):
        client.send(type="generate", id=number, prompt_ids=[5])
        group = groups[(number + 1) % 2]
        requests.append((group, group.expect(Submit).request))
    batch = [
        piece(request, 0, [7], "a", "stop") for group, request in requests if group is groups[0]
    ]
    ends = [number for number, (group, _) in enumerate(requests, 1) if group is groups[0]]
    faults[:] = ends[:2]
    groups[0].output(*batch)
    assert [item[0] for item in client.receive()["items"]] == ends
    for number in faults:
        client.expect_error("internal", number)
    credits = 0
    client.send(type="generate", id=7, prompt_ids=[5])
    while not isinstance(message := groups[0].next(), Submit):
        credits += isinstance(message, Credit)
    assert credits == 1
    requests.append((groups[0], message.request))
    for number, (group, request) in enumerate(requests, 1):
        if number not in ends:
            group.output(piece(request, 0, [7], "b", "stop"))
            assert client.receive_deltas(number)[0][3] == "b"
    assert in_flight(client) == 0
    assert outstanding_tokens(client) == 0


def test_clients_have_their_tokens_before_the_work_of_an_end(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for kind, name in ((session_module.Session, "flush"), (Router, "_finished")):
        found = getattr(kind, name)

        def spy(*arguments: Any, found: Any = found, name: str = name) -> Any:
            order.append(name)
            return found(*arguments)

        monkeypatch.setattr(kind, name, spy)
    near = start()
    group, client = near.group(), near.client()
    client.send(type="generate", id=1, prompt_ids=[5])
    group.output(piece(group.expect(Submit).request, 0, [7], "a", "stop"))
    assert client.receive_deltas(1)
    assert in_flight(client) == 0
    assert order == ["flush", "_finished"]


def test_a_message_for_which_there_is_no_memory(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its id it cannot be answered: the client is to ask again."""
    near = start()
    near.group()
    client = near.client()
    monkeypatch.setattr(session_module, "request_id_of", fails_once(None, MemoryError()))
    client.send(type="generate", id=1, prompt_ids=[5])
    client.expect_close()
    monkeypatch.undo()
    assert in_flight(near.client()) == 0


_STARVED = """
from albireo.router.{module} import {name} as kind
def fail(*arguments):
    raise MemoryError
kind.{method} = fail
"""


@pytest.fixture
def starved(runtime_dir: Path) -> Iterator[Callable[..., RouterProcess]]:
    """starved(module, name, method): a router whose method finds no memory."""
    routers: list[RouterProcess] = []

    def start_one(**names: str) -> RouterProcess:
        routers.append(RouterProcess(runtime_dir, _STARVED.format(**names)))
        return routers[-1]

    yield start_one
    for router in routers:
        router.control.close()
        router.process.kill()
        router.process.wait()


@pytest.mark.parametrize(
    ("module", "name", "method"),
    [
        ("delivery", "Delivery", "output"),
        ("router", "Router", "submit_all"),
        ("router", "Router", "_settle"),
        ("texts", "TextQueue", "expire"),
    ],
)
def test_a_router_without_memory_ends(
    starved: Callable[..., RouterProcess], module: str, name: str, method: str
) -> None:
    """Whatever it was doing is half done: the next router knows more."""
    router = starved(module=module, name=name, method=method)
    group, client = FakeGroup(router.spec), RawClient(router)
    group.join()
    client.send(type="generate", id=1, prompt_ids=[5])
    if method in ("output", "_settle"):
        group.output(piece(group.expect(Submit).request, 0, [7], "a", "stop"))
    try:
        assert router.process.wait(WAIT_S) == EXIT_FAILED
    except subprocess.TimeoutExpired:
        pytest.fail("the router goes on, and nobody will hear of the request again")
    finally:
        client.close()
        group.close()
