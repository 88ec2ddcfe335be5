"""The router's neighbours, played by the tests: group, tokenizer, supervisor, raw client.

The router itself is the real one, on its own thread and event loop.  The fakes
are driven step by step from the test's thread; Automatic plays group and
tokenizer by itself where a test only looks at the clients' side.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import uvloop
import zmq

from albireo.ipc.config import ActorSpec, EngineConfig
from albireo.ipc.link import Spoke
from albireo.ipc.messages import (
    Abort,
    ActorInfo,
    Decoded,
    DecodeIds,
    Drained,
    EncodeChat,
    Encoded,
    EncodeText,
    Joined,
    Output,
    Piece,
    Reset,
    Submit,
    TextFailed,
    ToDetokenizer,
    Topology,
    ToTokenizer,
)
from albireo.ipc.output_lane import OutputSender
from albireo.ipc.paths import OUTPUT_SOCKET
from albireo.ipc.protocol import MAX_FRAME_BYTES, End
from albireo.node.access import ListenSocket
from albireo.router import server
from albireo.router.journal import Journal
from albireo.router.router import Router
from albireo.router.server import serve

from ..specs import ENGINE, MODEL

WAIT_S = 5.0
VOCAB = 1000
CONTEXT = 128
EOS = 2


def make_spec(runtime_dir: Path, **changes: Any) -> ActorSpec:
    """A router's spec; keywords may name fields of the engine, too."""
    engine: dict[str, Any] = {
        "max_model_len": CONTEXT, "max_num_seqs": 64, "max_num_batched_tokens": 512,
    }  # fmt: skip
    fields: dict[str, Any] = {"incarnation": 0, "num_groups": 1, "max_num_queued_reqs": 64}
    for name, value in changes.items():
        (engine if name in EngineConfig.__struct_fields__ else fields)[name] = value
    model = msgspec.structs.replace(
        MODEL, name="fake-model", architecture="FakeForCausalLM", vocab_size=VOCAB,
        context_len=CONTEXT, eos_token_ids=(EOS,), bos_token_id=1, tool_style="llama",
    )  # fmt: skip
    return ActorSpec(
        role="router",
        name="router",
        node="test",
        runtime_dir=str(runtime_dir),
        threads=1,
        log_level="info",
        model=model,
        engine=msgspec.structs.replace(ENGINE, **engine),
        **fields,
    )


class RouterThread:
    """A router that serves in a thread of this process; port: of TCP, where spec.listen says so."""

    def __init__(self, spec: ActorSpec) -> None:
        self.spec = spec
        self.path = f"{spec.runtime_dir}/api.sock"
        self._stop_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._ready = threading.Event()
        self.error: BaseException | None = None
        self._tcp = None if spec.listen is None else ListenSocket("127.0.0.1:0")
        self.port = 0 if self._tcp is None else int(self._tcp.address.rpartition(":")[2])
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(WAIT_S), self.error

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                tcp = None
                if self._tcp is not None:
                    tcp = socket.socket(fileno=os.dup(self._tcp.fds["tcp"]))
                runner.run(serve(self.spec, self._ready.set, self._stop_fd, tcp=tcp))
        except BaseException as error:
            self.error = error
            raise

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        if not self.alive:
            return
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        os.close(self._stop_fd)
        self._stop_fd = -1
        if self._tcp is not None:
            self._tcp.close()

    def die(self) -> None:
        """Ends like a process that is killed: nobody gets a last word, and the journal stays as it
        is."""
        with (
            mock.patch.object(server, "_say_farewell", _drop_everybody),
            mock.patch.object(Journal, "close", drop_journal),
        ):
            self.stop()


def drop_journal(journal: Journal) -> None:
    """What a process's death does to it: nothing is written any more, and the lock is free."""
    journal._files.close()
    os.close(journal._lock)


async def _drop_everybody(router: Router) -> None:
    for session in list(router.sessions):
        session.abort()
    while router.sessions:
        await asyncio.sleep(0.001)


class FakeSpoke:
    """An actor's end of the link to the router."""

    def __init__(self, spec: ActorSpec, identity: str, receives: Any, joined: Joined) -> None:
        self._spoke: Spoke[Any] = Spoke(spec.socket_path("router"), identity, receives)
        self._poller = zmq.Poller()
        self._poller.register(self._spoke.socket, zmq.POLLIN)
        self._received: list[Any] = []
        self.joined = joined

    def join(self) -> None:
        self.send(self.joined)

    def send(self, message: msgspec.Struct) -> None:
        self._spoke.send(message)

    def next(self, timeout_s: float = WAIT_S) -> Any:
        """The next message from the router; raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while not self._received:
            left = max(0.0, deadline - time.monotonic())
            if not self._poller.poll(left * 1000):
                raise TimeoutError("the router sent nothing")
            self._received += self._spoke.drain()
        return self._received.pop(0)

    def expect(self, kind: type) -> Any:
        message = self.next()
        assert isinstance(message, kind), message
        return message

    def silent(self, for_s: float = 0.1) -> bool:
        """Whether the router sends nothing for that long."""
        try:
            self._received.insert(0, self.next(for_s))
        except TimeoutError:
            return True
        return False

    def close(self) -> None:
        self._spoke.close()


class FakeGroup(FakeSpoke):
    """A detokenizer with everything behind it."""

    def __init__(self, spec: ActorSpec, group: int = 0, incarnation: int = 0) -> None:
        joined = Joined("detokenizer", group, incarnation, os.getpid())
        super().__init__(spec, f"g{group}.{incarnation}", ToDetokenizer, joined)
        self.outputs = OutputSender(f"{spec.runtime_dir}/{OUTPUT_SOCKET}", joined)

    def output(self, *pieces: Piece) -> None:
        self.outputs.send(Output(list(pieces)))
        deadline = time.monotonic() + WAIT_S
        while not self.outputs.flush():
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def close(self) -> None:
        self.outputs.close()
        super().close()


class FakeTokenizer(FakeSpoke):
    def __init__(self, spec: ActorSpec, incarnation: int = 0) -> None:
        joined = Joined("tokenizer", -1, incarnation, os.getpid())
        super().__init__(spec, f"tokenizer.{incarnation}", ToTokenizer, joined)


class FakeSupervisor(FakeSpoke):
    def __init__(self, spec: ActorSpec) -> None:
        super().__init__(spec, "supervisor", Drained, Joined("supervisor", -1, 0, os.getpid()))

    def topology(
        self, *groups: str, incarnations: list[int] | None = None, tokenizer: int = 0,
        num_blocks: list[int] | None = None,
    ) -> None:  # fmt: skip
        actors = [ActorInfo("tokenizer", "tokenizer", -1, 4242, "ready", tokenizer, 1)]
        incarnations = incarnations or [0] * len(groups)
        self.send(Topology(actors, list(groups), incarnations, num_blocks or []))


def piece(
    request: int,
    index: int,
    ids: list[int],
    text: str = "",
    end: str | None = None,
    prompt: int = 1,
) -> Piece:
    last = None if end is None else End(end, None, prompt, index + len(ids))
    return Piece(request, index, ids, text, last)


def encode(text: str) -> list[int]:
    """The fake model's tokens: a byte each."""
    return [byte + 100 for byte in text.encode()]


def decode(ids: list[int]) -> str:
    """The text of such tokens; "?" for any other."""
    return bytes(each - 100 if 100 <= each < 228 else 63 for each in ids).decode()


class Automatic:
    """A thread that plays tokenizer and groups: it answers a prompt with itself, repeated.

    A prompt that starts with 999 is never answered, one with 998 gets one token
    and no more, each time that a group is given it.
    """

    def __init__(self, spec: ActorSpec) -> None:
        self._spec = spec
        self._stop = threading.Event()
        self.aborted: list[int] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(WAIT_S)

    def _run(self) -> None:
        # What a closed socket has not sent it still sends, to the next router, and as its name.
        lives = self._spec.incarnation
        tokenizer = FakeTokenizer(self._spec, lives)
        groups = [FakeGroup(self._spec, number, lives) for number in range(self._spec.num_groups)]
        running: list[dict[int, Submit]] = [{} for _ in groups]
        sent: dict[int, int] = {}
        for spoke in (tokenizer, *groups):
            spoke.join()
        while not self._stop.is_set():
            self._tokenize(tokenizer)
            for group, requests in zip(groups, running, strict=True):
                self._receive(group, requests, sent)
                pieces = [
                    self._step(submit, sent)
                    for submit in requests.values()
                    if submit.prompt_ids[0] != 998 or sent[submit.request] == submit.resumed
                ]
                if pieces:
                    group.output(*pieces)
                for each in pieces:
                    if each.end is not None:
                        del requests[each.request]
            self._stop.wait(0.0 if any(running) else 0.001)
        for spoke in (tokenizer, *groups):
            spoke.close()

    def _tokenize(self, tokenizer: FakeTokenizer) -> None:
        while not tokenizer.silent(0):
            message = tokenizer.next()
            if isinstance(message, EncodeText):
                tokenizer.send(Encoded(message.key, encode(message.text)))
            elif isinstance(message, EncodeChat):
                last = message.messages[-1]
                if last.role == "nobody":
                    tokenizer.send(TextFailed(message.key, "invalid_request", "no such role"))
                else:
                    tokenizer.send(Encoded(message.key, encode(last.content)))
            elif isinstance(message, DecodeIds):
                tokenizer.send(Decoded(message.key, decode(message.token_ids)))

    def _receive(self, group: FakeGroup, requests: dict[int, Submit], sent: dict[int, int]) -> None:
        while not group.silent(0):
            message = group.next()
            if isinstance(message, Submit):
                sent[message.request] = message.resumed
                if message.prompt_ids[0] != 999:
                    requests[message.request] = message
            elif isinstance(message, Abort):
                requests.pop(message.request, None)
                self.aborted.append(message.request)
            elif isinstance(message, Reset):
                requests.clear()
                group.join()

    def _step(self, submit: Submit, sent: dict[int, int]) -> Piece:
        start = sent[submit.request]
        prompt = submit.prompt_ids[: len(submit.prompt_ids) - submit.resumed]
        ids = [prompt[start % len(prompt)]]
        sent[submit.request] = start + 1
        end = "length" if start + 1 == submit.max_tokens else None
        return piece(submit.request, start, ids, decode(ids), end, len(prompt))


class RawClient:
    """A client without a library: frames of plain maps."""

    def __init__(self, router: RouterThread, hello: bool = True, receive_bytes: int = 0) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(WAIT_S)
        self.socket.connect(router.path)
        self._buffer = b""
        if hello:
            self.send(type="hello", protocol=1, client="raw")
            assert self.receive()["type"] == "welcome"

    def send(self, **message: Any) -> None:
        self.send_payload(msgspec.msgpack.encode(message))

    def send_payload(self, payload: bytes) -> None:
        self.socket.sendall(struct.pack("<I", len(payload)) + payload)

    def receive(self) -> dict[str, Any]:
        """The next message.  Raises EOFError when the router has closed the connection."""
        size = struct.unpack("<I", self._exactly(4))[0]
        assert size <= MAX_FRAME_BYTES, size
        message: dict[str, Any] = msgspec.msgpack.decode(self._exactly(size))
        return message

    def receive_deltas(self, request_id: int) -> list[list[Any]]:
        """Deltas of one request, up to the one with an end."""
        deltas: list[list[Any]] = []
        while not deltas or deltas[-1][4] is None:
            message = self.receive()
            assert message["type"] == "deltas", message
            deltas += [item for item in message["items"] if item[0] == request_id]
        return deltas

    def expect_error(self, code: str, request_id: int | None) -> dict[str, Any]:
        message = self.receive()
        assert message["type"] == "error", message
        assert (message["code"], message["id"]) == (code, request_id), message
        return message

    def expect_close(self) -> None:
        try:
            message = self.receive()
        except (EOFError, ConnectionError):
            return
        raise AssertionError(f"the connection is open, and sent {message}")

    def close(self) -> None:
        self.socket.close()

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError
            self._buffer += data
        found, self._buffer = self._buffer[:size], self._buffer[size:]
        return found
