"""Starting and stopping a node with gateways: sockets, drain, options that cannot be."""

from __future__ import annotations

import socket
import stat
import threading
from pathlib import Path
from typing import Any

import httpx2
import pytest

from albireo.node.http_sockets import HttpSockets, is_local, parse_address
from albireo.node.launch import stop_node
from albireo.node.options import OptionError

from .conftest import start_http_node


def test_addresses() -> None:
    assert parse_address("127.0.0.1:8000") == ("127.0.0.1", 8000)
    assert parse_address(":80") == ("", 80)
    assert parse_address("[::1]:80") == ("::1", 80)
    for text in ("8000", "a:b", "a:70000", "a:", ""):
        with pytest.raises(OptionError, match="HOST:PORT"):
            parse_address(text)
    assert all(is_local(each) for each in ("127.0.0.1:1", "localhost:1", "[::1]:1"))
    assert not any(is_local(each) for each in (":1", "0.0.0.0:1", "example.com:1"))


def test_sockets_of_several_gateways_share_one_port(tmp_path: Path) -> None:
    path = tmp_path / "s"
    sockets = HttpSockets("127.0.0.1:0", str(path), 3)
    try:
        ports = {
            socket.socket(fileno=socket.dup(sockets.fds(i)["http"])).getsockname()[1]
            for i in range(3)
        }
        assert len(ports) == 1
        assert sockets.address == f"http://127.0.0.1:{ports.pop()}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        sockets.close()
    assert not path.exists()


def test_a_port_in_use_is_refused() -> None:
    other = socket.create_server(("127.0.0.1", 0))
    with other, pytest.raises(OptionError, match="in use"):
        HttpSockets(f"127.0.0.1:{other.getsockname()[1]}", None, 1)
    first = HttpSockets("127.0.0.1:0", None, 2)
    try:
        assert first.address is not None
        with pytest.raises(OptionError, match="in use"):
            HttpSockets(first.address.removeprefix("http://"), None, 1)
    finally:
        first.close()


def test_paths_that_cannot_be_a_socket_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OptionError, match="no socket"):
        HttpSockets(None, str(file), 1)
    assert file.read_text() == "mine"
    with pytest.raises(OptionError, match="--uds"):
        HttpSockets(None, str(tmp_path / "none" / "s"), 1)
    with pytest.raises(OptionError, match="bytes"):
        HttpSockets(None, "/" + "x" * 200, 1)
    live = tmp_path / "live"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(live))
        other.listen()
        with pytest.raises(OptionError, match="another program"):
            HttpSockets(None, str(live), 1)
    # Nobody listens any more: what a dead node has left is replaced.
    HttpSockets(None, str(live), 1).close()


@pytest.mark.node
def test_a_stream_in_flight_is_finished_before_the_node_stops(
    module_home: Path, tiny_model_dir: Path
) -> None:
    node = start_http_node(
        module_home, name="drain", device="sim", sim_step_ms=5.0, model=str(tiny_model_dir)
    )
    seen: list[Any] = []
    begun = threading.Event()

    def read() -> None:
        body = {"prompt": "a", "stream": True, "max_tokens": 100, "ignore_eos": True}
        with httpx2.stream("POST", f"{node.http}/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                seen.append(line)
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(5)
    stop_node(node.name, timeout_s=20)
    reader.join(5)
    assert seen[-2] == "data: [DONE]"
    assert '"finish_reason":"length"' in seen[-4]
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{node.http}/health")
    assert not Path(node.uds).exists()


@pytest.mark.node
def test_options_that_cannot_be_stop_the_start(module_home: Path, tiny_model_dir: Path) -> None:
    (module_home / "empty").write_text("")
    with pytest.raises(AssertionError, match="has no key in it"):
        start_http_node(
            module_home, name="bad", device="sim", model=str(tiny_model_dir),
            api_key_file=str(module_home / "empty"),
        )  # fmt: skip
