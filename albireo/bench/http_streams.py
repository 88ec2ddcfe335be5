"""Many streaming HTTP clients in one process of their own, for `albireo bench gateway`.

    python -m albireo.bench.http_streams <JSON of Plan>

It runs the warm-up, says "ready" on standard output, waits for a line on standard
input, runs the streams, and prints a JSON object: Streamed.  The clients are
bare: one buffer is searched for ends of events and nothing is decoded, so that
what they cost is small beside what they measure.
"""

from __future__ import annotations

import asyncio
import sys
import time

import msgspec
import uvloop

_START_TIMEOUT_S = 60.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """address: "HOST:PORT", or the path of a Unix socket."""

    address: str
    model: str
    chat: bool
    streams: int
    tokens: int
    warm_up_tokens: int


class Streamed(msgspec.Struct, frozen=True, kw_only=True):
    """events: chunks with text or an end; tokens: what the usage chunks say.

    itl_ms: between two reads of a stream that brought events; cpu_s: of this process.
    """

    wall_s: float
    cpu_s: float
    events: int
    tokens: int
    reads: int
    ttft_ms_median: float
    itl_ms_median: float
    itl_ms_p99: float
    itl_ms_max: float


class _Client(asyncio.Protocol):
    """One request on one connection."""

    def __init__(self, request: bytes, done: asyncio.Future[None]) -> None:
        self.began = time.perf_counter()
        self.times: list[float] = []
        self.events = 0
        self._request = request
        self._done = done
        self._transport: asyncio.Transport
        self._last = b""
        self.tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        found = data.count(b"data: {")
        # An event is written at once; one that is cut between two reads begins with its name.
        if found:
            self.events += found
            self.times.append(time.perf_counter())
        tail = self._last + data
        self._last = data[-16:]
        if b"[DONE]" in tail or b"HTTP/1.1 4" in data or b"HTTP/1.1 5" in data:
            self.tail = data
            if not self._done.done():
                if b"[DONE]" in tail:
                    self._done.set_result(None)
                else:
                    self._done.set_exception(RuntimeError(data.decode(errors="replace")[-600:]))
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(RuntimeError(f"the connection broke: {error}"))


def main() -> None:
    uvloop.run(_run(msgspec.json.decode(sys.argv[1], type=Plan)))


async def _run(plan: Plan) -> None:
    await _streams(plan, plan.warm_up_tokens)
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    cpu = time.process_time()
    began = time.perf_counter()
    clients = await _streams(plan, plan.tokens)
    wall_s = time.perf_counter() - began
    cpu_s = time.process_time() - cpu
    gaps = sorted(
        (b - a) * 1e3 for each in clients for a, b in zip(each.times, each.times[1:], strict=False)
    )
    firsts = sorted((each.times[0] - each.began) * 1e3 for each in clients)
    result = Streamed(
        wall_s=wall_s,
        cpu_s=cpu_s,
        # The usage chunk, and of a chat the role's, are no answer to a token.
        events=sum(each.events for each in clients) - len(clients) * (2 if plan.chat else 1),
        tokens=sum(_completion_tokens(each.tail) for each in clients),
        reads=sum(len(each.times) for each in clients),
        ttft_ms_median=firsts[len(firsts) // 2],
        itl_ms_median=gaps[len(gaps) // 2],
        itl_ms_p99=gaps[int(len(gaps) * 0.99)],
        itl_ms_max=gaps[-1],
    )
    print(msgspec.json.encode(result).decode(), flush=True)


async def _streams(plan: Plan, tokens: int) -> list[_Client]:
    """All streams at once, to their ends.  Raises RuntimeError with what the server said."""
    loop = asyncio.get_running_loop()
    request = _request(plan, tokens)
    clients = []
    ends = []
    for _ in range(plan.streams):
        done: asyncio.Future[None] = loop.create_future()
        client = _Client(request, done)
        if plan.address.startswith("/"):
            await loop.create_unix_connection(lambda c=client: c, plan.address)  # type: ignore[misc]
        else:
            host, _, port = plan.address.rpartition(":")
            await loop.create_connection(lambda c=client: c, host, int(port))  # type: ignore[misc]
        clients.append(client)
        ends.append(done)
    await asyncio.gather(*ends)
    return clients


def _request(plan: Plan, tokens: int) -> bytes:
    body: dict[str, object] = {
        "model": plan.model, "max_tokens": tokens, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    if plan.chat:
        body["messages"] = [{"role": "user", "content": "Hello"}]
    else:
        body["prompt"] = list(range(16))
    payload = msgspec.json.encode(body)
    path = "/v1/chat/completions" if plan.chat else "/v1/completions"
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n"
    ).encode() + payload


def _completion_tokens(tail: bytes) -> int:
    """Of the last read, which has the usage chunk in it."""
    _, found, rest = tail.rpartition(b'"completion_tokens":')
    return int(rest.split(b",")[0]) if found else 0


if __name__ == "__main__":
    main()
