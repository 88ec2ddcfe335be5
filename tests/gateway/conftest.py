"""One node of the `sim` device for all tests of this folder that need a real one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from albireo.node.events import Event, NodeFailed, NodeReady
from albireo.node.launch import run_detached, stop_node
from albireo.node.options import NodeOptions

KEYS = {"alice": "key-of-alice", "bob": "key-of-bob"}
MODEL = "tiny"


class HttpNode(msgspec.Struct):
    """A running node with an HTTP gateway.  http: "http://HOST:PORT"; uds: a path."""

    name: str
    http: str
    uds: str


def start_http_node(home: Path, **fields: object) -> HttpNode:
    """Starts a node in `home`; ALBIREO_RUNTIME_DIR and _STATE_DIR must be there already."""
    options = NodeOptions(uds=str(home / f"{fields['name']}.sock"), http="127.0.0.1:0", **fields)  # type: ignore[arg-type]
    events: list[Event] = []
    if run_detached(options, events.append) != 0:
        log = home / "state" / f"{options.name}.log"
        text = log.read_text()[-3000:] if log.exists() else "(no log)"
        raise AssertionError(f"{[e for e in events if isinstance(e, NodeFailed)]}\n{text}")
    ready = next(each for each in events if isinstance(each, NodeReady))
    return HttpNode(options.name, ready.facts["http"], ready.facts["uds"])


@pytest.fixture(scope="module")
def http_node(module_home: Path, tiny_model_dir: Path) -> Iterator[HttpNode]:
    """Two gateways, keys for alice and bob, the tiny tokenizer, steps of 2 ms."""
    keys = module_home / "keys"
    keys.write_text("".join(f"{name}:{key}\n" for name, key in KEYS.items()))
    os.chmod(keys, 0o600)
    node = start_http_node(
        module_home, name="http", device="sim", sim_step_ms=2.0, model=str(tiny_model_dir),
        served_model_name=MODEL, gateways=2, api_key_file=str(keys),
    )  # fmt: skip
    yield node
    stop_node(node.name, now=True, timeout_s=20)
    assert not Path(node.uds).exists()
