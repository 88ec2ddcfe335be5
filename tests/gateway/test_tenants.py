"""API keys as tenants, on a real node: caches apart, limits of their own, and weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from albireo.client import Client, DeltaStream, QueueFull

from .serving import wait_for

pytestmark = pytest.mark.node

KEYS = {"alice": "key-of-alice", "bob": "key-of-bob"}
PROMPT = [5] * 200
Start = Callable[..., str]


@pytest.fixture
def keys(tmp_path: Path) -> str:
    path = tmp_path / "keys"
    path.write_text("".join(f"{name}:{key}\n" for name, key in KEYS.items()))
    return str(path)


class Http:
    """The node's HTTP server on a Unix socket, asked with keys."""

    def __init__(self, path: Path) -> None:
        self._client = httpx2.Client(
            transport=httpx2.HTTPTransport(uds=str(path)), base_url="http://node", timeout=60
        )

    def ask(self, name: str, prompt: list[int], tokens: int, **more: Any) -> httpx2.Response:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True} | more
        key = {"authorization": f"Bearer {KEYS[name]}"}
        return self._client.post("/v1/completions", json=body, headers=key)


def scheduled(client: Client, prompt_tokens: int) -> list[dict[str, Any]]:
    """The groups' status, once their schedulers have told of so many prompt tokens together."""
    while True:
        groups: list[dict[str, Any]] = client.status()["groups"]
        told = [each["scheduler"] or {} for each in groups]
        if sum(each.get("prompt_tokens", 0) for each in told) >= prompt_tokens:
            return groups
        time.sleep(0.05)


def test_no_key_finds_the_prompts_of_another(
    start_node: Start, tiny_model_dir: Path, keys: str, tmp_path: Path
) -> None:
    uds = tmp_path / "http"
    name = start_node(
        name="apart", model=str(tiny_model_dir), served_model_name="tiny", device="sim",
        groups=(1, 1), sim_step_ms=1.0, max_model_len=512, uds=str(uds), api_key_file=keys,
        isolate_tenants=True,
    )  # fmt: skip
    http = Http(uds)

    def hits(prompt_tokens: int) -> tuple[int, int]:
        """Prompt tokens found in the caches, and those that the router hoped for."""
        groups = scheduled(client, prompt_tokens)
        return (
            sum(each["scheduler"]["prefix_hit_tokens"] for each in groups),
            sum(each["found_tokens"] for each in groups),
        )

    with Client.connect(node=name) as client:
        for _ in range(2):  # one for each group, wherever the first one goes
            assert http.ask("alice", PROMPT, 4).status_code == 200
        had = hits(2 * len(PROMPT))
        assert had[0] > 0 and had[1] > 0
        # Neither another key, nor a salt or a name that looks like hers, nor no name at all.
        asked = 2
        for salt in ("", "5:alice", "alice"):
            assert http.ask("bob", PROMPT, 4, cache_salt=salt).status_code == 200
            client.generate(PROMPT, max_tokens=4, ignore_eos=True, cache_salt=salt)
            asked += 2
        assert hits(asked * len(PROMPT)) == had
        assert http.ask("alice", PROMPT, 4).status_code == 200
        now = hits((asked + 1) * len(PROMPT))
        assert now[0] > had[0] and now[1] > had[1]


def test_a_key_has_a_limit_of_its_own_and_the_node_one_for_all(
    start_node: Start, tiny_model_dir: Path, keys: str, tmp_path: Path
) -> None:
    uds = tmp_path / "http"
    name = start_node(
        name="full", model=str(tiny_model_dir), served_model_name="tiny", device="sim",
        sim_step_ms=20.0, max_model_len=512, max_num_seqs=1, max_num_queued_reqs=3, uds=str(uds),
        api_key_file=keys, max_num_reqs_per_tenant=2,
    )  # fmt: skip
    http = Http(uds)
    with Client.connect(node=name) as client:
        streams: list[DeltaStream] = []

        def all_are_there() -> bool:
            return bool(client.status()["requests"]["in_flight"] == len(streams))

        for key in ("alice", "bob"):  # On the socket a key's name is the tenant, too.
            streams += [
                client.stream([5], max_tokens=400, ignore_eos=True, tenant=key) for _ in range(2)
            ]
            wait_for(all_are_there)
            about = "--max-num-reqs-per-tenant" if key == "alice" else "--max-num-queued-reqs"
            refused = http.ask(key, [5], 1)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
            assert about in refused.json()["error"]["message"]
            with pytest.raises(QueueFull, match=about) as caught:
                client.generate([5], tenant=key)
            assert caught.value.retry
        for stream in streams:
            stream.close()
        streams.clear()
        wait_for(all_are_there)
        assert http.ask("alice", [5], 1).status_code == 200
