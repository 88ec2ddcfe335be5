"""`albireo bench sampling`: the time from a step's logits to its tokens (T4), by kind of request.

Every rank is a process of its own that imports PyTorch; the caller does not.
On CUDA the time is that of a replayed graph, as in a decode step, rank 0's
clock; on CPU that of the call.
"""

from __future__ import annotations

import itertools
import multiprocessing
import queue
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from .machine import machine
from .nodes import BenchError

_DEADLINE_S = 300.0
_REPEATS = 50
_LOGIT_SPREAD = 2.5
_SEED = 7


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests of one kind; 0, 1 and 0 where top_k, top_p and min_p are off."""

    name: str
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def full(self) -> bool:
        return self.temperature > 0

    @property
    def filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


KINDS = (
    Kind("greedy", temperature=0.0),
    Kind("temperature"),
    Kind("top-k", top_k=50),
    Kind("top-p", top_p=0.95),
    Kind("min-p", min_p=0.02),
    Kind("full", top_k=50, top_p=0.95, min_p=0.02),
)


@dataclass(frozen=True, slots=True)
class _Task:
    """What the processes of the ranks are given."""

    device: str
    vocab: int
    batches: tuple[int, ...]
    ranks: int
    dtype: str
    store: str


def bench_sampling(
    device: str, vocab: int, batches: list[int], ranks: int, dtype: str
) -> dict[str, Any]:
    """T4 in microseconds for each kind of request and batch size.

    device: "cpu", "cuda", or "auto" for CUDA where there is one.  ranks: of the
    TP group that shares the vocabulary.  Raises BenchError.
    """
    if vocab % ranks:
        raise BenchError(f"a vocabulary of {vocab} does not divide by {ranks} ranks")
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory(prefix="albireo-") as folder:
        task = _Task(device, vocab, tuple(batches), ranks, dtype, f"{folder}/store")
        processes = [
            context.Process(target=_run_rank, args=(task, rank, results), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            found = [_next_result(results, processes) for _ in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
    measured = next(rows for rank, rows in found if rank == 0)
    return {
        "bench": "sampling",
        "machine": machine(),
        **measured["device"],
        "vocab": vocab,
        "ranks": ranks,
        "dtype": dtype,
        "kinds": [asdict(kind) for kind in KINDS],
        "results": measured["results"],
    }


def _next_result(results: Any, processes: list[Any]) -> tuple[int, Any]:
    deadline = time.monotonic() + _DEADLINE_S
    while time.monotonic() < deadline:
        try:
            rank, result, failure = results.get(timeout=0.5)
        except queue.Empty:
            dead = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0)]
            if dead:
                raise BenchError(
                    f"rank {dead[0]} ended with status {processes[dead[0]].exitcode}"
                ) from None
            continue
        if failure is not None:
            raise BenchError(f"rank {rank}: {failure}")
        return rank, result
    raise BenchError(f"no rank has answered for {_DEADLINE_S:g} s")


def _run_rank(task: _Task, rank: int, results: Any) -> None:
    """The process of a rank."""
    try:
        import torch

        device = task.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            results.put((rank, _measure_cuda(task, rank), None))
        elif task.ranks > 1:
            raise BenchError("several ranks are measured on CUDA only: say --groups 1x1")
        else:
            results.put((rank, _measure_cpu(task), None))
    except BenchError as error:
        results.put((rank, None, str(error)))
    except Exception:
        results.put((rank, None, traceback.format_exc()))


def _rows(task: _Task, measure: Callable[[Kind, int], list[float]]) -> list[dict[str, Any]]:
    """measure(kind, batch): times in microseconds."""
    rows = []
    for batch in task.batches:
        for kind in KINDS:
            times = sorted(measure(kind, batch))
            rows.append(
                {
                    "kind": kind.name,
                    "batch": batch,
                    "us": round(statistics.median(times), 1),
                    "us_p99": round(times[min(len(times) * 99 // 100, len(times) - 1)], 1),
                }
            )
    return rows


def _measure_cpu(task: _Task) -> dict[str, Any]:
    import numpy as np
    import torch

    from albireo.workers.parallel.communicator import SingleRank
    from albireo.workers.sampling.params import SampleRows, SlotParams
    from albireo.workers.sampling.sampler import Sampler

    most = max(task.batches)
    generator = torch.Generator().manual_seed(_SEED)
    logits = torch.randn(most, task.vocab, generator=generator) * _LOGIT_SPREAD
    logits = logits.to(getattr(torch, task.dtype))
    sampler = Sampler(task.vocab, most, SingleRank())
    numbers = np.arange(most, dtype=np.int32)

    def measure(kind: Kind, batch: int) -> list[float]:
        params = SlotParams.zeros(most)
        for name in ("temperature", "top_k", "top_p", "min_p"):
            getattr(params, name)[:] = getattr(kind, name)
        params.seed[:] = numbers
        rows = SampleRows(
            slots=numbers[:batch], requests=numbers[:batch], positions=numbers[:batch]
        )
        times = []
        for _ in range(7):
            began = time.perf_counter()
            sampler.sample(logits[:batch], rows, params)
            times.append((time.perf_counter() - began) * 1e6)
        return times[1:]

    return {"device": {"device": "cpu"}, "results": _rows(task, measure)}


def _measure_cuda(task: _Task, rank: int) -> dict[str, Any]:
    import torch

    from albireo.workers.parallel.communicator import DeviceCommunicator, SingleRank
    from albireo.workers.sampling.cuda import CudaSampler

    if torch.cuda.device_count() < task.ranks:
        raise BenchError(
            f"{task.ranks} ranks need {task.ranks} GPUs; {torch.cuda.device_count()} are here"
        )
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    communicator: DeviceCommunicator = SingleRank()
    if task.ranks > 1:
        from albireo.workers.parallel.cuda import CudaCommunicator

        communicator = CudaCommunicator(task.store, rank, task.ranks, device, _DEADLINE_S)
    most, width = max(task.batches), task.vocab // task.ranks
    generator = torch.Generator(device).manual_seed(_SEED + rank)
    logits = torch.randn(most, width, generator=generator, device=device) * _LOGIT_SPREAD
    logits = logits.to(getattr(torch, task.dtype))
    sampler = CudaSampler(most, task.vocab, rank * width, communicator, device)
    sampler.prepare(logits.dtype)
    numbers = torch.arange(most, dtype=torch.int32, device=device)
    out = torch.zeros(most, dtype=torch.int32, device=device)

    def measure(kind: Kind, batch: int) -> list[float]:
        tables = _DeviceTables(kind, most, device)

        def sample() -> None:
            sampler.sample(
                logits[:batch], numbers[:batch], tables, numbers[:batch], kind.full, out[:batch],
                kind.filtered,
            )  # fmt: skip

        return _replay_us(sample)

    name = torch.cuda.get_device_name(device)
    return {"device": {"device": "cuda", "gpu": name}, "results": _rows(task, measure)}


class _DeviceTables:
    """Sampling parameters of all slots, the same for all; see sampling/cuda/sampler.py."""

    def __init__(self, kind: Kind, slots: int, device: Any) -> None:
        import torch

        self.temperature = torch.full((slots,), kind.temperature, device=device)
        self.top_k = torch.full((slots,), kind.top_k, dtype=torch.int32, device=device)
        self.top_p = torch.full((slots,), kind.top_p, device=device)
        self.min_p = torch.full((slots,), kind.min_p, device=device)
        self.seed = torch.arange(slots, dtype=torch.int64, device=device)


def _replay_us(work: Callable[[], None]) -> list[float]:
    """Times of a graph of `work`, captured and replayed in the current stream."""
    import torch

    stream = torch.cuda.current_stream()
    work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    events: list[Any] = [
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(_REPEATS + 1)
    ]
    for _ in range(3):
        graph.replay()
    for event in events[:-1]:
        event.record()
        graph.replay()
    events[-1].record()
    stream.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in itertools.pairwise(events)]
