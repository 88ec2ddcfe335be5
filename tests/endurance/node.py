"""A node of the `sim` device with two groups and all its doors open, for `make storm` (storm.py)
and `make soak` (soak.py): what very many clients have left behind is seen by watch.py."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from albireo.client import Client
from albireo.node.options import NodeOptions
from albireo.node.owned import OwnedNode

from ..certificates import self_signed
from ..tiny_model import write_tiny_model

KEY = "key-of-the-endurance-tests"


class Running(NamedTuple):
    """http: host and port.  listen: "tls://..." for clients that trust `ca` and have KEY."""

    name: str
    socket: str
    http: tuple[str, int]
    listen: str
    ca: str

    def status(self) -> dict[str, Any]:
        with Client.connect(node=self.name) as client:
            return client.status()

    def pids(self) -> dict[str, int]:
        """By name, of all its processes."""
        return {actor["name"]: actor["pid"] for actor in self.status()["actors"]}

    def held(self) -> dict[str, int]:
        """What is not zero while somebody is served; connections are those besides the asker's
        and the gateway's."""
        tree = self.status()
        found = {
            "requests": tree["requests"]["in_flight"],
            "connections": tree["connections"] - 2,
        }
        for group in tree["groups"]:
            number, scheduler = group["group"], group["scheduler"] or {}
            found[f"requests of group {number}"] = group["in_flight"]
            for what in ("running", "waiting", "kv_blocks_used"):
                found[f"{what} of group {number}"] = scheduler.get(what, 0)
        return {what: count for what, count in found.items() if count}


@contextlib.contextmanager
def running(kind: str, **more: Any) -> Iterator[Running]:
    """Starts one in a directory of its own, and ends it."""
    with tempfile.TemporaryDirectory(prefix="alb") as home:
        model = Path(home) / "model"
        model.mkdir()
        write_tiny_model(model)
        pair = self_signed(Path(home), "node")
        options: dict[str, Any] = {
            "name": f"{kind}-{os.getpid()}", "model": str(model), "served_model_name": "m",
            "groups": (1, 1), "device": "sim", "sim_step_ms": 2.0, "kv_cache_gib": 0.01,
            "http": "127.0.0.1:0", "listen": "127.0.0.1:0", "api_key": KEY,
            "tls_cert": pair.cert, "tls_key": pair.key,
        }  # fmt: skip
        node = OwnedNode(NodeOptions(**options | more))
        try:
            facts = node.facts
            address = urlsplit(facts["http"])
            assert address.hostname is not None and address.port is not None
            http = (address.hostname, address.port)
            yield Running(node.name, facts["socket"], http, facts["listen"], pair.cert)
        finally:
            node.stop()
