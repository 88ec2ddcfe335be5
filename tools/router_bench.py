"""What the router and the client library cost, with a timer in place of a model.

Three processes: a real router; a group that sends one token of every stream
each step, through a real link with real credits; and this one, with one client
that holds all streams.  CPU times are those of the processes, divided by the
steps.  The client checks the index of every token.

    python tools/router_bench.py --streams 256 --step-ms 5 --json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import zmq

from albireo.client import AlbireoError, AsyncClient, Delta
from albireo.ipc.actor import Actor, Ready, from_actor
from albireo.ipc.config import LOOKAHEAD, ActorSpec, EngineConfig, ModelInfo
from albireo.ipc.link import Spoke
from albireo.ipc.messages import Abort, Credit, Joined, Output, Piece, Submit, ToDetokenizer
from albireo.ipc.protocol import End
from albireo.router.process import main as router_main

CREDITS = 8
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def make_spec(runtime_dir: str, streams: int, tokens: int) -> ActorSpec:
    """A router in front of one group that takes all streams at once."""
    return ActorSpec(
        role="router",
        name="router",
        node="bench",
        incarnation=0,
        runtime_dir=runtime_dir,
        threads=1,
        log_level="warning",
        max_num_queued_reqs=streams,
        model=ModelInfo(
            name="timer",
            architecture="none",
            vocab_size=50_000,
            context_len=tokens + 16,
            eos_token_ids=(),
            bos_token_id=None,
            hidden_size=1,
            num_params=1,
            weight_bytes=1,
            kv_bytes_per_token=1,
            tp_degrees=(1,),
        ),
        engine=EngineConfig(
            model_path="",
            device="sim",
            dtype="float32",
            load_format="dummy",
            tp=1,
            max_model_len=tokens + 16,
            block_size=16,
            num_blocks=tokens * streams,
            max_num_seqs=streams,
            max_num_batched_tokens=8192,
            lookahead=LOOKAHEAD,
            batch_invariant=False,
            step_timeout_s=10.0,
            spin_us=0,
            sim_step_ms=0.0,
        ),
    )


class TimerGroup:
    """Sends a token of each running request at every step, as credits allow."""

    def __init__(self, spec: ActorSpec, step_ms: float) -> None:
        self._spoke: Spoke[Submit | Abort | Credit] = Spoke(
            spec.socket_path("router"), "g0.0", ToDetokenizer
        )
        self._spoke.send(Joined("detokenizer", 0, 0, os.getpid()))
        self._step_s = step_ms / 1000
        self._running: dict[int, tuple[Submit, int]] = {}
        self._credits = CREDITS

    def run(self) -> None:
        """Until it is killed."""
        poller = zmq.Poller()
        poller.register(self._spoke.socket, zmq.POLLIN)
        due = time.monotonic()
        while True:
            wait_s = max(0.0, due - time.monotonic()) if self._can_step() else 1.0
            poller.poll(wait_s * 1000)
            for message in self._spoke.drain():
                self._take(message)
            if self._can_step() and time.monotonic() >= due:
                self._step()
                due = max(due + self._step_s, time.monotonic() - self._step_s)

    def _can_step(self) -> bool:
        return bool(self._running) and self._credits > 0

    def _take(self, message: object) -> None:
        if isinstance(message, Submit):
            self._running[message.request] = (message, 0)
        elif isinstance(message, Abort):
            self._running.pop(message.request, None)
        elif isinstance(message, Credit):
            self._credits += message.batches

    def _step(self) -> None:
        pieces = []
        for request, (submit, index) in list(self._running.items()):
            end = None
            if index + 1 == submit.max_tokens:
                end = End("length", None, len(submit.prompt_ids), index + 1)
                del self._running[request]
            else:
                self._running[request] = (submit, index + 1)
            pieces.append(Piece(request, index, [1000 + index], " token", end))
        self._spoke.send(Output(pieces))
        self._credits -= 1


class Receiver:
    """The client's side: counts and checks every token."""

    def __init__(self, streams: int, tokens: int) -> None:
        self._tokens = tokens
        self._open = streams
        self.received = 0
        self.done = asyncio.get_running_loop().create_future()

    def callback(self) -> CheckedStream:
        return CheckedStream(self)

    def failed(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def ended(self, index: int) -> None:
        if index != self._tokens:
            self.failed(RuntimeError(f"{index} tokens came, not {self._tokens}"))
        self._open -= 1
        self.received += index
        if not self._open and not self.done.done():
            self.done.set_result(None)


class CheckedStream:
    """One stream's callback."""

    __slots__ = ("_index", "_receiver")

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._index = 0

    def __call__(self, reply: Delta | AlbireoError) -> None:
        if isinstance(reply, AlbireoError):
            self._receiver.failed(reply)
            return
        if reply.index != self._index or reply.token_ids[0] != 1000 + self._index:
            self._receiver.failed(RuntimeError(f"token {self._index} expected, {reply} came"))
        self._index += len(reply.token_ids)
        if reply.end is not None:
            self._receiver.ended(self._index)


def cpu_s(pid: int) -> float:
    """CPU time of a process, user and system."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


async def receive_all(path: str, arguments: argparse.Namespace) -> int:
    """Runs all streams on one connection; returns the number of tokens."""
    async with await AsyncClient.connect(path) as client:
        sampling = {"max_tokens": arguments.tokens, "ignore_eos": True}
        if arguments.mode == "callback":
            receiver = Receiver(arguments.streams, arguments.tokens)
            for _ in range(arguments.streams):
                client.submit([1], receiver.callback(), **sampling)
            await receiver.done
            return receiver.received

        async def consume() -> int:
            count = 0
            async for delta in client.stream([1], **sampling):
                if delta.index != count:
                    raise RuntimeError(f"token {count} was expected, {delta} came")
                count += len(delta.token_ids)
            return count

        return sum(await asyncio.gather(*(consume() for _ in range(arguments.streams))))


@contextmanager
def child(role: str, spec: ActorSpec, step_ms: float) -> Iterator[int]:
    """This script in another role; yields its pid."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, __file__, "--role", role, "--step-ms", str(step_ms),
         "--spec", msgspec.msgpack.encode(spec).hex(), "--control", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
    )  # fmt: skip
    theirs.close()
    try:
        if role == "router" and not isinstance(from_actor.decode(ours.recv(1 << 16)), Ready):
            raise SystemExit("the router did not start")
        yield process.pid
    finally:
        process.kill()
        process.wait()
        ours.close()


def measure(arguments: argparse.Namespace) -> dict[str, float | int | str]:
    """Runs the three processes and returns the figures."""
    with tempfile.TemporaryDirectory(prefix="alb") as runtime_dir:
        spec = make_spec(runtime_dir, arguments.streams, arguments.tokens)
        with child("router", spec, 0) as router, child("group", spec, arguments.step_ms) as group:
            pids = {"router": router, "group": group, "client": os.getpid()}
            before = {name: cpu_s(pid) for name, pid in pids.items()}
            began = time.monotonic()
            tokens = asyncio.run(receive_all(f"{runtime_dir}/api.sock", arguments))
            wall_s = time.monotonic() - began
            used = {name: cpu_s(pid) - before[name] for name, pid in pids.items()}
    return {
        "streams": arguments.streams,
        "steps": arguments.tokens,
        "step_ms": arguments.step_ms,
        "mode": arguments.mode,
        "tokens": tokens,
        "wall_s": round(wall_s, 3),
        "tokens_per_s": round(tokens / wall_s),
        "router_cpu_ms_per_step": round(1000 * used["router"] / arguments.tokens, 3),
        "client_cpu_ms_per_step": round(1000 * used["client"] / arguments.tokens, 3),
        "group_cpu_ms_per_step": round(1000 * used["group"] / arguments.tokens, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=256, help="requests in flight")
    parser.add_argument("--tokens", type=int, default=1000, help="tokens of each, and steps")
    parser.add_argument("--step-ms", type=float, default=5.0, help="0: as fast as credits allow")
    parser.add_argument(
        "--mode", choices=("callback", "stream"), default="callback",
        help="AsyncClient.submit() with callbacks, or an AsyncDeltaStream and a task for each",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--role", choices=("bench", "router", "group"), default="bench",
                        help=argparse.SUPPRESS)  # fmt: skip
    parser.add_argument("--spec", help=argparse.SUPPRESS)
    parser.add_argument("--control", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role != "bench":
        spec = msgspec.msgpack.decode(bytes.fromhex(arguments.spec), type=ActorSpec)
        if arguments.role == "router":
            router_main(Actor(spec, {"control": arguments.control}), {})
        else:
            TimerGroup(spec, arguments.step_ms).run()
        return
    figures = measure(arguments)
    if arguments.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:24} {value}")


if __name__ == "__main__":
    main()
