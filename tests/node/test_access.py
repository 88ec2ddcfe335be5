"""TCP, TLS and HTTPS of a node: options that belong together, and a real one of each."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from click.testing import CliRunner

from albireo.cli.main import main
from albireo.client import AlbireoError, AuthenticationError, Client
from albireo.ipc.keys import KeyFileError
from albireo.node.access import ListenSocket, check_access
from albireo.node.options import NodeOptions, OptionError
from albireo.node.runtime_dir import read_facts

from ..certificates import Pair, self_signed
from .processes import pids, wait_for

KEY = "key-of-alice"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return self_signed(tmp_path_factory.mktemp("tls"), "node")


def test_tcp_needs_tls_and_a_key_on_the_loopback_too(pair: Pair) -> None:
    listen = "127.0.0.1:0"
    with pytest.raises(OptionError, match=r"--tls-cert FILE and --tls-key FILE and --api-key-file"):
        check_access(NodeOptions(listen=listen))
    with pytest.raises(OptionError, match=r"give --api-key-file FILE \(or --api-key KEY\) as well"):
        check_access(NodeOptions(listen=listen, tls_cert=pair.cert, tls_key=pair.key))
    with pytest.raises(OptionError, match="give --tls-key FILE as well"):
        check_access(NodeOptions(listen=listen, tls_cert=pair.cert, api_key=KEY))
    whole = NodeOptions(listen=listen, tls_cert=pair.cert, tls_key=pair.key, api_key=KEY)
    assert check_access(whole) is None


def test_what_goes_together(pair: Pair) -> None:
    with pytest.raises(OptionError, match="--listen HOST:PORT"):
        check_access(NodeOptions(tls_cert=pair.cert, tls_key=pair.key))
    with pytest.raises(OptionError, match="give both"):
        check_access(NodeOptions(http=":0", ssl_certfile=pair.cert))
    with pytest.raises(OptionError, match="--http HOST:PORT"):
        check_access(NodeOptions(ssl_certfile=pair.cert, ssl_keyfile=pair.key))
    with pytest.raises(OptionError, match="--listen '8000': expected HOST:PORT"):
        check_access(NodeOptions(listen="8000"))
    with pytest.raises(KeyFileError, match="8 characters"):
        check_access(NodeOptions(api_key="short"))
    assert "asks for no key" in (check_access(NodeOptions(http="0.0.0.0:0")) or "")


def test_files_that_are_no_certificates(pair: Pair, tmp_path: Path) -> None:
    other = self_signed(tmp_path, "other")
    for cert, key in ((pair.key, pair.key), (pair.cert, other.key), (pair.cert, "/none")):
        with pytest.raises(OptionError, match=r"--tls-cert and --tls-key: .*(PEM|cannot be read)"):
            check_access(NodeOptions(listen=":0", tls_cert=cert, tls_key=key, api_key=KEY))
        with pytest.raises(OptionError, match="--ssl-certfile and --ssl-keyfile: "):
            check_access(NodeOptions(http="127.0.0.1:0", ssl_certfile=cert, ssl_keyfile=key))


def test_a_key_with_a_password_is_refused_and_nobody_is_asked(pair: Pair, tmp_path: Path) -> None:
    locked = str(tmp_path / "locked.key")
    command = ["openssl", "pkey", "-in", pair.key, "-aes256", "-passout", "pass:secret"]
    subprocess.run([*command, "-out", locked], check=True, capture_output=True)
    with pytest.raises(OptionError, match="no password"):
        check_access(NodeOptions(listen=":0", tls_cert=pair.cert, tls_key=locked, api_key=KEY))


def test_the_listening_socket_notices_machines_that_vanish() -> None:
    listener = ListenSocket("127.0.0.1:0")
    ours = socket.socket(fileno=os.dup(listener.fds["tcp"]))
    assert listener.address == f"tls://127.0.0.1:{ours.getsockname()[1]}"
    assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
    with pytest.raises(OptionError, match=r"--listen .*in use"):
        ours.listen()
        ListenSocket(listener.address.removeprefix("tls://"))
    ours.close()
    listener.close()


@pytest.mark.node
def test_a_node_with_tls_on_every_port(
    start_node: Callable[..., str], tiny_model_dir: Path, pair: Pair, tmp_path: Path
) -> None:
    node = start_node(
        name="tls", model=str(tiny_model_dir), device="sim", sim_step_ms=1.0, api_key=KEY,
        listen="127.0.0.1:0", tls_cert=pair.cert, tls_key=pair.key,
        http="127.0.0.1:0", ssl_certfile=pair.cert, ssl_keyfile=pair.key,
    )  # fmt: skip
    facts = read_facts(node)
    assert facts is not None
    where = facts["listen"]

    def tokens() -> int:
        with Client.connect(where, api_key=KEY, ca=pair.cert) as client:
            return len(client.generate([1, 2], max_tokens=5, ignore_eos=True).token_ids)

    assert tokens() == 5
    with pytest.raises(AuthenticationError):
        Client.connect(where, ca=pair.cert)

    assert facts["http"].startswith("https://")
    trusting = ssl.create_default_context(cafile=pair.cert)
    with httpx2.Client(verify=trusting, headers={"authorization": f"Bearer {KEY}"}) as http:
        body = {"prompt": [1, 2], "max_tokens": 5, "stream": True, "ignore_eos": True}
        answer = http.post(f"{facts['http']}/v1/completions", json=body)
        assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
    with pytest.raises(httpx2.HTTPError):
        httpx2.get(facts["http"].replace("https", "http") + "/health")

    (tmp_path / "key").write_text(f"{KEY}\n")
    words = ["generate", "Hi", "--connect", where, "--ca", pair.cert, "--max-tokens", "3"]
    assert (
        CliRunner().invoke(main, [*words, "--api-key-file", str(tmp_path / "key")]).exit_code == 0
    )
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 1 and "API key" in refused.output

    # The port outlives a router.
    router = pids(node)["router"]
    os.kill(router, signal.SIGKILL)

    def again() -> bool:
        try:
            return tokens() == 5
        except AlbireoError:
            return False

    wait_for("the next router serves TCP", again, 20)
    assert pids(node)["router"] != router
