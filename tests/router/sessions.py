"""What tests of sessions that outlive their connections ask and see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from albireo.ipc.messages import Submit

from .conftest import Neighbourhood
from .fakes import FakeGroup, RawClient

Start = Callable[..., Neighbourhood]
SESSION = "a-name-that-only-one-client-knows"


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
