"""Requests whose connection is over wait for their session's next one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from albireo.ipc.config import TenantConfig
from albireo.ipc.messages import Abort, GroupDown, Piece, Submit
from albireo.ipc.protocol import Logprobs, TokenLogprob
from albireo.router import resume

from .conftest import Neighbourhood
from .fakes import FakeGroup, RawClient, piece

Start = Callable[..., Neighbourhood]
SESSION = "a-name-that-only-one-client-knows"
ONE_REQUEST = 4096
"""Bytes of a journal's file for which two requests with LONG are too many."""
LONG = {"stop": ["?" * 250 + str(each) for each in range(4)]}


def join(near: Neighbourhood, session: str = SESSION) -> RawClient:
    client = near.client(hello=False)
    client.send(type="hello", protocol=1, session=session)
    welcome = client.receive()
    assert welcome["type"] == "welcome" and welcome["resume_s"] == near.router.spec.resume_s
    return client


def submit(group: FakeGroup) -> Submit:
    """The next request of a group; credits and aborts before it are passed over."""
    while not isinstance(message := group.next(), Submit):
        pass
    return message


def counts(client: RawClient) -> dict[str, int]:
    client.send(type="status", id=9999)
    requests: dict[str, int] = client.receive()["status"]["requests"]
    return requests


def ask(client: RawClient, number: int = 1, **params: Any) -> None:
    """tenant: whose request it is; the rest are sampling parameters."""
    tenant = {"tenant": params.pop("tenant")} if "tenant" in params else {}
    params = {"max_tokens": 20, "seed": 4, **params}
    client.send(type="generate", id=number, prompt_ids=[5, 6, 7], params=params, **tenant)


def test_a_request_goes_on_behind_what_the_client_has(start: Start) -> None:
    near = start(resume_s=5.0)
    group = near.group()
    client = join(near)
    ask(client, stop=["x"], min_tokens=3, logprobs=0)
    first = submit(group)
    group.output(piece(first.request, 0, [11, 12, 13], "abc"))
    assert client.receive()["items"][0][:4] == [1, 0, [11, 12, 13], "abc"]
    client.close()
    while not isinstance(group.next(), Abort):
        pass  # nothing is computed for a client that is not there
    client = join(near)
    assert counts(client)["waiting_for_client"] == 1 and counts(client)["in_flight"] == 0
    client.send(type="resume", id=1, have=[[0, 2]])
    again = submit(group)
    assert (again.prompt_ids, again.resumed) == ([5, 6, 7, 11, 12], 2)
    assert again.request != first.request
    for name in ("max_tokens", "min_tokens", "seed", "stop", "stop_token_ids", "logprobs"):
        assert getattr(again, name) == getattr(first, name)
    group.output(piece(again.request, 2, [13, 14], "cd", "length", prompt=3))
    assert client.receive()["items"][0][:5] == [1, 2, [13, 14], "cd", ["length", None, 3, 4]]
    after = counts(client)
    assert (after["resumed"], after["finished"], after["cancelled"]) == (1, 1, 0)
    assert (after["waiting_for_client"], after["in_flight"]) == (0, 0)


def test_nobody_else_can_claim_it_and_nobody_twice(start: Start) -> None:
    near = start(resume_s=5.0)
    group = near.group()
    client = join(near)
    ask(client)
    request = submit(group).request
    group.output(piece(request, 0, [11], "a"))
    client.receive()
    client.close()
    other = join(near, SESSION[:-1] + "S")
    anonymous = near.client()
    for each in (other, anonymous):
        each.send(type="resume", id=1, have=[[0, 1]])
        assert each.expect_error("lost", 1)["retry"]
    client = join(near)
    client.send(type="resume", id=1, have=[[0, 1]])
    submit(group)
    client.send(type="resume", id=1, have=[[0, 1]])
    assert "in use" in client.expect_error("invalid_request", None)["message"]


def test_who_comes_too_late_has_lost_it(start: Start) -> None:
    near = start(resume_s=0.05)
    group = near.group()
    client = join(near)
    ask(client)
    request = submit(group).request
    group.output(piece(request, 0, [11], "a"))
    client.receive()
    client.close()
    client = join(near)
    deadline = time.monotonic() + 5
    while counts(client)["waiting_for_client"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    client.send(type="resume", id=1, have=[[0, 1]])
    assert "no record" in client.expect_error("lost", 1)["message"]


def test_a_node_that_does_not_keep_requests_says_so(start: Start) -> None:
    near = start()
    group = near.group()
    client = join(near)
    ask(client)
    submit(group)
    client.close()
    while not isinstance(group.next(), Abort):
        pass
    client = join(near)
    assert counts(client)["cancelled"] == 1
    client.send(type="resume", id=1, have=[[0, 0]])
    client.expect_error("lost", 1)


@pytest.mark.parametrize(
    ("have", "code", "says"),
    [
        ([[0, 2]], "lost", "knows 1 tokens of this answer, and the client has 2"),
        ([[1, 0]], "lost", "no record of answer 1"),
        ([[0, -1]], "lost", "-1"),
        ([], "invalid_request", "once"),
        ([[0, 1], [0, 1]], "invalid_request", "once"),
        ([[0, 1, 9]], "invalid_request", "3 tokens, not 9"),
        ([[0, "x"]], "invalid_request", "not valid"),
    ],
)
def test_claims_that_cannot_be(start: Start, have: list[Any], code: str, says: str) -> None:
    near = start(resume_s=5.0)
    group = near.group()
    client = join(near)
    ask(client)
    request = submit(group).request
    group.output(piece(request, 0, [11], "a"))
    client.receive()
    client.close()
    client = join(near)
    client.send(type="resume", id=1, have=have)
    assert says in client.expect_error(code, 1)["message"]
    client.send(type="models", id=2)
    assert client.receive()["type"] == "model_list"


def test_a_new_connection_takes_over_from_one_that_seems_alive(start: Start) -> None:
    near = start(resume_s=5.0)
    group = near.group()
    old = join(near)
    ask(old)
    request = submit(group).request
    group.output(piece(request, 0, [11], "a"))
    old.receive()
    new = join(near)
    old.expect_close()
    new.send(type="resume", id=1, have=[[0, 1]])
    assert submit(group).prompt_ids == [5, 6, 7, 11]
    assert counts(new)["waiting_for_client"] == 0


def test_an_end_that_was_sent_and_did_not_come(start: Start) -> None:
    near = start(resume_s=5.0)
    group = near.group()
    client = join(near)
    ask(client)
    request = submit(group).request
    group.output(piece(request, 0, [11, 12], "ab"))
    assert client.receive()["items"][0][2] == [11, 12]
    group.output(piece(request, 2, [13], "c", "stop", prompt=3))
    group.next(), group.next()  # both credits: the router has sent it
    client.close()
    client = join(near)
    assert counts(client)["waiting_for_client"] == 0
    client.send(type="resume", id=1, have=[[0, 2]])
    again = submit(group)
    assert (again.prompt_ids, again.resumed) == ([5, 6, 7, 11, 12], 2)
    group.output(piece(again.request, 2, [13], "c", "stop", prompt=3))
    assert client.receive_deltas(1)[0][:4] == [1, 2, [13], "c"]
    client.send(type="resume", id=2, have=[[0, 0]])
    client.expect_error("lost", 2)


def test_ends_are_not_known_for_ever(start: Start) -> None:
    near = start(resume_s=0.3)
    group = near.group()
    client = join(near)
    ask(client)
    group.output(piece(submit(group).request, 0, [11], "a", "stop"))
    client.receive_deltas(1)
    time.sleep(0.8)
    client.close()
    client = join(near)
    client.send(type="resume", id=1, have=[[0, 0]])
    client.expect_error("lost", 1)


def test_several_answers_of_which_one_has_ended(start: Start) -> None:
    near = start(resume_s=5.0)
    group = near.group()
    client = join(near)
    ask(client, n=3, seed=8)
    one, two, three = (submit(group) for _ in range(3))
    group.output(
        piece(one.request, 0, [11], "a"), piece(two.request, 0, [21], "b", "stop"),
        piece(three.request, 0, [31, 32], "cd"),
    )  # fmt: skip
    assert len(client.receive()["items"]) == 3
    client.close()
    client = join(near)
    client.send(type="resume", id=1, have=[[2, 1], [0, 0]])
    again = sorted((submit(group) for _ in range(2)), key=lambda each: each.seed)
    assert [each.prompt_ids for each in again] == [[5, 6, 7], [5, 6, 7, 31]]
    assert [each.seed for each in again] == [one.seed, three.seed]
    group.output(piece(again[0].request, 0, [11], "a", "stop"))
    assert client.receive()["items"][0][5] == 0
    group.output(piece(again[1].request, 1, [32], "d", "stop"))
    assert client.receive()["items"][0][1:6] == [1, [32], "d", ["stop", None, 1, 2], 2]
    assert counts(client)["in_flight"] == 0


def test_prompt_logprobs_are_not_repeated(start: Start) -> None:
    near = start(resume_s=5.0)
    group = near.group()
    client = join(near)
    ask(client, prompt_logprobs=0)
    found = [Logprobs(TokenLogprob(token, -1.0, 1, b""), []) for token in (6, 7)]
    group.output(Piece(submit(group).request, 0, [], "", None, None, found[:1]))
    client.receive()
    client.close()
    client = join(near)
    client.send(type="resume", id=1, have=[[0, 0, 1]])
    again = submit(group)
    assert again.prompt_logprobs == 0
    group.output(Piece(again.request, 0, [11], "a", None, None, found))
    assert [each[0][0] for each in client.receive()["items"][0][7]] == [7]


def test_its_group_may_die_as_well(start: Start) -> None:
    near = start(resume_s=5.0, max_failovers=2)
    group = near.group()
    supervisor = near.supervisor()
    client = join(near)
    ask(client)
    group.output(piece(submit(group).request, 0, [11], "a"))
    client.receive()
    client.close()
    client = join(near)
    client.send(type="resume", id=1, have=[[0, 1]])
    again = submit(group)
    group.output(piece(again.request, 1, [12], "b"))
    client.receive()
    supervisor.send(GroupDown(0, 0, "it was killed"))
    third = submit(near.group(0, incarnation=1))
    assert (third.prompt_ids, third.resumed) == ([5, 6, 7, 11, 12], 2)


BOUNDED: dict[str, Any] = {"resume_s": 10.0, "max_num_seqs": 1, "max_num_queued_reqs": 1}


def test_what_has_ended_needs_a_place_to_be_computed_again(start: Start) -> None:
    """Else one session could have all it ever asked computed at once, again and again."""
    near = start(**BOUNDED)
    group = near.group()
    client = join(near)
    for number in range(1, 6):
        ask(client, number)
        group.output(piece(submit(group).request, 0, [11], "a", "stop", prompt=3))
        client.receive_deltas(number)
    for number in range(1, 4):
        client.send(type="resume", id=number, have=[[0, 0]])
    error = client.expect_error("lost", 3)
    assert error["retry"] and "2 answers are in flight" in error["message"]
    assert counts(client)["in_flight"] == 2
    first = submit(group).request
    group.output(piece(first, 0, [11], "a", "stop", prompt=3))
    client.receive_deltas(1)
    client.send(type="resume", id=4, have=[[0, 0]])
    assert counts(client)["in_flight"] == 2


def test_what_has_ended_takes_no_place_that_is_for_those_with_few(start: Start) -> None:
    near = start(resume_s=10.0, max_num_seqs=32, max_num_queued_reqs=32)
    group = near.group()
    client = join(near)
    for number in range(1, 71):
        ask(client, number)
        group.output(piece(submit(group).request, 0, [11], "a", "stop", prompt=3))
        client.receive_deltas(number)
    for number in range(1, 71):
        client.send(type="resume", id=number, have=[[0, 0]])
    for number in range(65, 71):
        client.expect_error("lost", number)
    assert counts(client)["in_flight"] == 64
    other = near.client()
    ask(other)
    assert counts(other)["in_flight"] == 65


def test_places_are_kept_for_those_who_are_away(start: Start) -> None:
    near = start(**BOUNDED, tenants=TenantConfig(max_num_reqs=1))
    group = near.group()
    client = near.client(hello=False)
    client.send(type="hello", protocol=1, session=SESSION)
    client.receive()
    ask(client, 1, tenant="ann")
    group.output(piece(submit(group).request, 0, [11], "a"))
    client.receive()
    client.close()
    client = join(near)
    assert counts(client)["waiting_for_client"] == 1
    ask(client, 2, tenant="ann")
    assert "this client" in client.expect_error("queue_full", 2)["message"]
    ask(client, 3, tenant="bob")
    submit(group)
    ask(client, 4, tenant="cid")
    assert "2 answers are in flight" in client.expect_error("queue_full", 4)["message"]
    client.send(type="resume", id=1, have=[[0, 1]])
    assert submit(group).prompt_ids == [5, 6, 7, 11]
    assert counts(client)["in_flight"] == 2


def test_what_is_lost_keeps_no_place(start: Start) -> None:
    near = start(**BOUNDED, tenants=TenantConfig(max_num_reqs=1))
    group = near.group()
    client = join(near)
    ask(client, 1, tenant="ann")
    submit(group)
    client.close()
    client = join(near)
    client.send(type="resume", id=1, have=[[0, 5]])
    client.expect_error("lost", 1)
    assert counts(client)["waiting_for_client"] == 0
    ask(client, 2, tenant="ann")
    submit(group)


def test_who_asks_again_gets_the_place_of_what_was_asked_before(start: Start) -> None:
    near = start(**BOUNDED, tenants=TenantConfig(max_num_reqs=1))
    group = near.group()
    for _ in range(3):
        client = join(near)
        ask(client, 1, tenant="ann")
        submit(group)
        client.close()
    client = join(near)
    ask(client, 1, tenant="ann")
    group.output(piece(submit(group).request, 0, [11], "a", "stop"))
    client.receive_deltas(1)
    assert counts(client)["waiting_for_client"] == 0


def test_a_session_s_name_must_not_be_guessable(start: Start) -> None:
    near = start(resume_s=5.0)
    for name in ("short", "x" * 129):
        client = near.client(hello=False)
        client.send(type="hello", protocol=1, session=name)
        assert "22 to 128" in client.expect_error("protocol", None)["message"]


# ---------------------------------------------------------------------- the router dies
class Deaths:
    """Routers one after the other, with one journal and one group."""

    def __init__(self, near: Neighbourhood, journal: Path) -> None:
        self.near = near
        self._journal = journal
        self.journal_bytes = 1 << 24
        self.incarnation = -1

    def start(self) -> RawClient:
        self.incarnation += 1
        self.near.start(
            resume_s=5.0, journal=str(self._journal), journal_bytes=self.journal_bytes,
            incarnation=self.incarnation,
        )  # fmt: skip
        self.group = self.near.group(0, self.incarnation)
        return join(self.near)

    def die(self) -> None:
        self.near.router.die()

    def files(self) -> list[Path]:
        return list(self._journal.iterdir())


@pytest.fixture
def deaths(neighbourhood: Neighbourhood, tmp_path: Path) -> Iterator[Deaths]:
    yield Deaths(neighbourhood, tmp_path / "journal")


def test_requests_outlive_two_routers(deaths: Deaths) -> None:
    client = deaths.start()
    ask(client, logit_bias={7: 1.0})
    first = submit(deaths.group)
    deaths.group.output(piece(first.request, 0, [11, 12], "ab"))
    client.receive()
    for death in (1, 2):
        deaths.die()
        client = deaths.start()
        assert counts(client)["waiting_for_client"] == 1
        client.send(type="resume", id=1, have=[[0, 1 + death]])
        again = submit(deaths.group)
        assert again.prompt_ids == [5, 6, 7, 11, 12, 13][: 4 + death]
        assert (again.seed, again.logit_bias, again.resumed) == (4, {7: 1.0}, 1 + death)
        deaths.group.output(piece(again.request, 1 + death, [12 + death], "c"))
        client.receive()
    deaths.group.output(piece(again.request, 4, [15], "d", "length", prompt=3))
    assert client.receive()["items"][0][4] == ["length", None, 3, 5]


def test_death_between_the_claim_and_the_next_token(deaths: Deaths) -> None:
    client = deaths.start()
    ask(client)
    deaths.group.output(piece(submit(deaths.group).request, 0, [11, 12], "ab"))
    client.receive()
    for _ in range(3):
        deaths.die()
        client = deaths.start()
        client.send(type="resume", id=1, have=[[0, 2]])
        assert submit(deaths.group).prompt_ids == [5, 6, 7, 11, 12]


def test_an_end_that_the_client_did_not_get(deaths: Deaths) -> None:
    """What it lacks is computed again."""
    client = deaths.start()
    ask(client)
    first = submit(deaths.group)
    deaths.group.output(piece(first.request, 0, [11, 12], "ab", "stop"))
    client.receive()
    deaths.die()
    client = deaths.start()
    client.send(type="resume", id=1, have=[[0, 1]])
    assert submit(deaths.group).prompt_ids == [5, 6, 7, 11]


def test_an_answer_that_goes_on_after_its_end(deaths: Deaths) -> None:
    """Of its two records the later one counts: its client has these tokens."""
    client = deaths.start()
    ask(client)
    first = submit(deaths.group)
    deaths.group.output(piece(first.request, 0, [11, 12, 13], "abc", "stop"))
    client.receive()
    client.close()
    client = join(deaths.near)
    client.send(type="resume", id=1, have=[[0, 1]])
    again = submit(deaths.group)
    deaths.group.output(piece(again.request, 1, [22], "B"))
    client.receive()
    deaths.die()
    client = deaths.start()
    assert counts(client)["waiting_for_client"] == 1
    client.send(type="resume", id=1, have=[[0, 2]])
    assert submit(deaths.group).prompt_ids == [5, 6, 7, 11, 22]


@pytest.mark.parametrize("how", ["resumed", "asked again", "asked again, and forgotten"])
def test_what_goes_on_without_room_in_the_journal_is_lost_with_its_router(
    deaths: Deaths, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The tokens of an earlier answer, which are there, are not those that its client has."""
    deaths.journal_bytes = 3 * ONE_REQUEST
    client = deaths.start()
    ask(client, **LONG)
    deaths.group.output(piece(submit(deaths.group).request, 0, [11, 12, 13], "abc", "stop"))
    client.receive()
    ask(client, 2, **LONG)
    submit(deaths.group)
    if how == "resumed":
        client.close()
        client = join(deaths.near)
        client.send(type="resume", id=1, have=[[0, 1]])
    else:
        if how == "asked again, and forgotten":
            monkeypatch.setattr(resume, "MAX_ENDED", 1)
            ask(client, 3, **LONG)
            deaths.group.output(piece(submit(deaths.group).request, 0, [31], "x", "stop"))
            client.receive()
        ask(client, **LONG)
    again = submit(deaths.group)
    deaths.group.output(piece(again.request, again.resumed, [22], "B"))
    assert client.receive()["items"][0][:3] == [1, again.resumed, [22]]
    deaths.die()
    client = deaths.start()
    assert counts(client)["waiting_for_client"] == 1, "the one that had room"
    client.send(type="resume", id=1, have=[[0, again.resumed + 1]])
    client.expect_error("lost", 1)


def test_what_has_ended_waits_for_nobody(deaths: Deaths) -> None:
    """Its client may lack the end, and can have it; a node that ends leaves no file of it."""
    client = deaths.start()
    ask(client)
    deaths.group.output(piece(submit(deaths.group).request, 0, [11], "a", "stop"))
    client.receive()
    deaths.die()
    client = deaths.start()
    assert counts(client)["waiting_for_client"] == 0
    deaths.near.router.stop()
    assert deaths.files() == []


def test_a_client_with_more_tokens_than_the_journal(deaths: Deaths) -> None:
    client = deaths.start()
    ask(client)
    deaths.group.output(piece(submit(deaths.group).request, 0, [11], "a"))
    client.receive()
    deaths.die()
    client = deaths.start()
    client.send(type="resume", id=1, have=[[0, 2]])
    assert "the client has 2" in client.expect_error("lost", 1)["message"]


def test_clients_without_a_session_are_not_in_the_journal(deaths: Deaths) -> None:
    deaths.start()
    plain = deaths.near.client()
    ask(plain)
    deaths.group.output(piece(submit(deaths.group).request, 0, [11], "a"))
    plain.receive()
    deaths.die()
    assert counts(deaths.start())["waiting_for_client"] == 0
