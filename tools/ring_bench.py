"""Measures the rings between real processes, and soaks them.

    python tools/ring_bench.py [--json] [--messages N] [--soak N] [--collective]

cost        CPU time of reserve + publish and of poll + release, nobody waiting
latency     one way between two processes: half of a ping-pong, spinning or not
throughput  one writer, 4 readers that each read every message
soak        one writer, 3 readers, all pausing at random; each reader checks
            every byte of every message, which follow from its sequence number
collective  (--collective) all_reduce between the ranks of a group; needs torch

Every wait has a deadline, so it ends in bounded time whatever breaks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from albireo.ipc.ring import RingReader, RingSpec, RingWriter, create_ring

WAIT_S = 60.0
SPINS_US = (0, 50)
MESSAGE_BYTES = 256
THROUGHPUT_READERS = 4
SOAK_READERS = 3
SOAK_FRAMES = 64
PAUSE_EVERY = 5000  # messages, on average
PAUSE_S = 0.002  # at most

_NUMBER = struct.Struct("<Q")
_PATTERN = random.Random(7).randbytes(4096)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--messages", type=int, default=100_000, metavar="N")
    parser.add_argument("--soak", type=int, default=10_000_000, metavar="N", help="0 = none")
    parser.add_argument("--seed", type=int, default=1, help="of the soak's pauses")
    parser.add_argument("--collective", action="store_true", help="measure all_reduce too")
    options = parser.parse_args()

    report: dict[str, Any] = {"cores": os.cpu_count()}

    def show(part: str, figures: Any) -> None:
        report[part] = figures
        if not options.json:
            print(f"{part}: {json.dumps(figures)}", flush=True)

    show("cost", measure_cost(options.messages))
    show("latency", [measure_latency(options.messages // 5, spin) for spin in SPINS_US])
    show("throughput", [measure_throughput(options.messages, spin) for spin in SPINS_US])
    if options.soak:
        show("soak", soak(options.soak, options.seed))
    if options.collective:
        show("collective", list(measure_collectives()))
    if options.json:
        print(json.dumps(report, indent=2))
    return 0


@contextmanager
def children(works: list[Callable[[], None]]) -> Iterator[None]:
    """Runs each work in a forked process; at the end waits for all, and fails if one failed."""
    sys.stdout.flush()
    pids = [_fork(work) for work in works]
    try:
        yield
    finally:
        failed = [pid for pid in pids if os.waitpid(pid, 0)[1] != 0]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(pids)} processes failed; see their errors above")


def _fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            sys.stdout.flush()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


# ------------------------------------------------------------ cost
def measure_cost(messages: int) -> dict[str, float]:
    """Microseconds of CPU time of the two sides' calls."""
    spec = RingSpec("cost", 16, MESSAGE_BYTES, ("reader",))
    fd = create_ring(spec)
    writer, reader = RingWriter(spec, fd), RingReader(spec, fd, "reader")
    write_s = read_s = 0.0
    for _ in range(messages // spec.frames):
        start = time.thread_time()
        for _ in range(spec.frames):
            writer.reserve(WAIT_S)
            writer.publish(MESSAGE_BYTES)
        middle = time.thread_time()
        for _ in range(spec.frames):
            reader.poll()
            reader.release()
        read_s += time.thread_time() - middle
        write_s += middle - start
    count = messages // spec.frames * spec.frames
    os.close(fd)
    return {
        "reserve_publish_us": round(write_s / count * 1e6, 2),
        "poll_release_us": round(read_s / count * 1e6, 2),
    }


# ------------------------------------------------------------ latency
def measure_latency(round_trips: int, spin_us: int) -> dict[str, float]:
    """One-way latency in microseconds, both sides waiting with this spin budget."""
    ping, pong = (RingSpec(name, 4, MESSAGE_BYTES, ("reader",)) for name in ("ping", "pong"))
    ping_fd, pong_fd = create_ring(ping), create_ring(pong)

    def answer() -> None:
        reader = RingReader(ping, ping_fd, "reader", spin_us=spin_us)
        writer = RingWriter(pong, pong_fd, spin_us=spin_us)
        for _ in range(round_trips):
            frame = reader.wait(WAIT_S)
            writer.reserve(WAIT_S)[: len(frame)] = frame
            writer.publish(len(frame))
            reader.release()

    with children([answer]):
        writer = RingWriter(ping, ping_fd, spin_us=spin_us)
        reader = RingReader(pong, pong_fd, "reader", spin_us=spin_us)
        times = []
        for _ in range(round_trips):
            start = time.perf_counter()
            writer.reserve(WAIT_S)
            writer.publish(64)
            reader.wait(WAIT_S)
            reader.release()
            times.append(time.perf_counter() - start)
    os.close(ping_fd)
    os.close(pong_fd)
    times.sort()
    return {
        "spin_us": spin_us,
        "median_us": round(times[len(times) // 2] / 2 * 1e6, 2),
        "p99_us": round(times[len(times) * 99 // 100] / 2 * 1e6, 2),
    }


# ------------------------------------------------------------ throughput
def measure_throughput(messages: int, spin_us: int) -> dict[str, float]:
    """Messages a second that every reader gets; the writer does not spin."""
    readers = tuple(f"reader{k}" for k in range(THROUGHPUT_READERS))
    spec = RingSpec("throughput", 64, MESSAGE_BYTES, readers)
    fd = create_ring(spec)
    ready, reported = os.pipe(), os.pipe()

    def read(name: str) -> None:
        reader = RingReader(spec, fd, name, spin_us=spin_us)
        os.write(ready[1], b".")
        for _ in range(messages):
            reader.wait(WAIT_S)
            reader.release()
        os.write(reported[1], struct.pack("<d", time.monotonic()))

    with children([lambda name=name: read(name) for name in spec.readers]):  # type: ignore[misc]
        writer = RingWriter(spec, fd)
        _read_exactly(ready[0], THROUGHPUT_READERS)
        start = time.monotonic()
        for _ in range(messages):
            writer.reserve(WAIT_S)
            writer.publish(MESSAGE_BYTES)
    ends = struct.unpack(
        f"<{THROUGHPUT_READERS}d", _read_exactly(reported[0], 8 * THROUGHPUT_READERS)
    )
    for descriptor in (fd, *ready, *reported):
        os.close(descriptor)
    elapsed_s = max(ends) - start
    return {
        "spin_us": spin_us,
        "readers": THROUGHPUT_READERS,
        "message_bytes": MESSAGE_BYTES,
        "messages_per_s": round(messages / elapsed_s),
    }


def _read_exactly(descriptor: int, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        if not select.select([descriptor], [], [], WAIT_S)[0]:
            raise SystemExit("a process has not reported; see its error above")
        data += os.read(descriptor, nbytes - len(data))
    return data


# ------------------------------------------------------------ soak
def soak(messages: int, seed: int) -> dict[str, Any]:
    """Fails when any reader misses a message, sees one twice or sees a wrong byte."""
    spec = RingSpec(
        "soak", SOAK_FRAMES, MESSAGE_BYTES, tuple(f"reader{k}" for k in range(SOAK_READERS))
    )
    fd = create_ring(spec)

    def read(name: str) -> None:
        reader = RingReader(spec, fd, name)
        pauses = _Pauses(f"{seed} {name}")
        for number in range(messages):
            if bytes(reader.wait(WAIT_S)) != soak_message(number):
                raise SystemExit(f"{name}: message {number} is wrong")
            pauses.maybe()
            reader.release()

    start = time.monotonic()
    with children([lambda name=name: read(name) for name in spec.readers]):  # type: ignore[misc]
        writer = RingWriter(spec, fd)
        pauses = _Pauses(f"{seed} writer")
        for number in range(messages):
            message = soak_message(number)
            writer.reserve(WAIT_S)[: len(message)] = message
            writer.publish(len(message))
            pauses.maybe()
    os.close(fd)
    elapsed_s = time.monotonic() - start
    return {
        "messages": messages,
        "readers": SOAK_READERS,
        "seed": seed,
        "elapsed_s": round(elapsed_s, 1),
        "messages_per_s": round(messages / elapsed_s),
        "ok": True,
    }


def soak_message(number: int) -> bytes:
    """Its number and a stretch of the pattern; 8 to 255 bytes, place and length by the number."""
    place = number * 2654435761 >> 9 & 2047
    return _NUMBER.pack(number) + _PATTERN[place : place + number % 248]


class _Pauses:
    """Sleeps at random, seeded: about once in PAUSE_EVERY calls, up to PAUSE_S."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)
        self._left = self._random.randint(1, 2 * PAUSE_EVERY)

    def maybe(self) -> None:
        self._left -= 1
        if self._left == 0:
            time.sleep(self._random.uniform(0, PAUSE_S))
            self._left = self._random.randint(1, 2 * PAUSE_EVERY)


# ------------------------------------------------------------ collective
def measure_collectives() -> Iterator[dict[str, Any]]:
    """all_reduce of one and of 32 rows of the demo model's width, in a tight loop."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for size in (2, 3):
        for rows in (1, 32):
            for spin_us in SPINS_US:
                yield measure_all_reduce(size, rows, 576, spin_us)


def measure_all_reduce(size: int, rows: int, hidden: int, spin_us: int) -> dict[str, Any]:
    """Microseconds an all_reduce of [rows, hidden] bfloat16, by the clock and of CPU a rank."""
    import torch

    from albireo.ipc.shared_memory import create
    from albireo.workers.parallel.shared import (
        SharedMemoryCommunicator,
        shared_bytes,
        slab_bytes,
    )

    shape = (size, rows, hidden, 1, 1)
    fd = create("collective", shared_bytes(*shape))
    reported = os.pipe()
    count = 3000

    def take_part(rank: int) -> None:
        torch.set_num_threads(1)
        communicator = SharedMemoryCommunicator(fd, rank, size, slab_bytes(*shape), WAIT_S, spin_us)
        x = torch.zeros(rows, hidden, dtype=torch.bfloat16)
        with torch.inference_mode():
            for _ in range(100):
                communicator.all_reduce(x)
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in range(count):
                communicator.all_reduce(x)
        wall_s, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
        if rank == 0:
            os.write(reported[1], struct.pack("<2d", wall_s, cpu_s))

    with children([lambda rank=rank: take_part(rank) for rank in range(size)]):  # type: ignore[misc]
        pass
    wall_s, cpu_s = struct.unpack("<2d", _read_exactly(reported[0], 16))
    for descriptor in (fd, *reported):
        os.close(descriptor)
    return {
        "ranks": size,
        "rows": rows,
        "spin_us": spin_us,
        "all_reduce_us": round(wall_s / count * 1e6, 1),
        "cpu_us": round(cpu_s / count * 1e6, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
