"""Requests that outlive their router, by its journal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from albireo.router import resume

from .conftest import Neighbourhood
from .fakes import RawClient, piece
from .sessions import ask, counts, join, submit

ONE_REQUEST = 4096
"""Bytes of a journal's file for which two requests with LONG are too many."""
LONG = {"stop": ["?" * 250 + str(each) for each in range(4)]}


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
