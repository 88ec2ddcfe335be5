"""`albireo bench sampling`: the time from a step's logits to its tokens (T4), by kind of request.

Every rank is a process of its own that imports PyTorch; the caller does not.  On CUDA the
time is that of a replayed graph, as in a decode step, by rank 0's clock, in every
--sampling-mode where there are several ranks; on CPU that of the call.
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
from typing import TYPE_CHECKING, Any

from .machine import machine
from .nodes import BenchError
from .sampling_kinds import KINDS, Kind, one_request

if TYPE_CHECKING:
    from albireo.workers.engine.cuda.slot_tables import SlotTables
    from albireo.workers.sampling.cuda import CudaSampler

_DEADLINE_S = 300.0
_REPEATS = 50
_LOGIT_SPREAD = 2.5
_SEED = 7


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


def _measure_cpu(task: _Task) -> dict[str, Any]:
    import numpy as np
    import torch

    from albireo.workers.parallel.communicator import SingleRank
    from albireo.workers.sampling.edits import SlotEdits
    from albireo.workers.sampling.params import SampleRows, SlotParams
    from albireo.workers.sampling.sampler import Sampler

    most = max(task.batches)
    generator = torch.Generator().manual_seed(_SEED)
    logits = torch.randn(most, task.vocab, generator=generator) * _LOGIT_SPREAD
    sampler = Sampler(task.vocab, most, SingleRank())
    numbers = np.arange(most, dtype=np.int32)
    results = []
    for kind in KINDS:
        edits = SlotEdits(most, task.vocab)
        params = SlotParams.zeros(most)
        for name in ("temperature", "top_k", "top_p", "min_p"):
            getattr(params, name)[:] = getattr(kind, name)
        params.seed[:] = numbers
        if kind.penalized:
            for slot in range(most):
                edits.apply_plan(one_request(kind, slot, task.vocab))
        for batch in task.batches:
            rows = SampleRows(*(numbers[:batch] for _ in range(3)))
            given = logits[:batch].to(getattr(torch, task.dtype))
            times = []
            for _ in range(7):
                began = time.perf_counter()
                if kind.penalized:
                    given = given.float()
                    edits.apply(given.numpy(), rows)
                sampler.sample(given, rows, params)
                times.append((time.perf_counter() - began) * 1e6)
            results.append(_result(kind, batch, times[1:]))
    return {"device": {"device": "cpu"}, "results": results}


def _measure_cuda(task: _Task, rank: int) -> dict[str, Any]:
    import torch

    from albireo.workers.parallel.communicator import DeviceCommunicator, SingleRank
    from albireo.workers.sampling.cuda import CudaSampler
    from albireo.workers.sampling.cuda.sampler import AUTO, MODES

    if torch.cuda.device_count() < task.ranks:
        raise BenchError(
            f"{task.ranks} ranks need {task.ranks} GPUs; {torch.cuda.device_count()} are here"
        )
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    communicator: DeviceCommunicator = SingleRank()
    modes: tuple[str, ...] = (AUTO,)
    if task.ranks > 1:
        from albireo.workers.parallel.cuda import CudaCommunicator

        communicator = CudaCommunicator(task.store, rank, task.ranks, device, _DEADLINE_S)
        modes = MODES
    most, width = max(task.batches), task.vocab // task.ranks
    generator = torch.Generator(device).manual_seed(_SEED + rank)
    fresh = torch.randn(most, width, generator=generator, device=device) * _LOGIT_SPREAD
    fresh = fresh.to(getattr(torch, task.dtype))
    logits = fresh.clone()
    out = torch.zeros(most, dtype=torch.int32, device=device)
    numbers = torch.arange(most, dtype=torch.int32, device=device)
    results = []
    for mode in modes:
        sampler = CudaSampler(most, task.vocab, rank * width, communicator, device, mode)
        for kind in KINDS:
            tables = _slot_tables(kind, task, rank, device)
            logits.copy_(fresh)
            for batch in task.batches:
                before = sampler.undecided
                step = _step(sampler, kind, tables, logits[:batch], numbers[:batch], out[:batch])
                step()
                left = (sampler.undecided - before) / batch
                found = _result(kind, batch, _replay_us(step))
                if task.ranks > 1:
                    found |= {"mode": mode, "left": round(left, 4)}
                results.append(found)
    name = torch.cuda.get_device_name(device)
    return {"device": {"device": "cuda", "gpu": name}, "results": results}


def _step(
    sampler: CudaSampler, kind: Kind, tables: SlotTables, logits: Any, numbers: Any, out: Any
) -> Callable[[], None]:
    """From logits to tokens; row i is of slot i."""
    from albireo.workers.sampling.cuda.edits import edit

    def step() -> None:
        if kind.penalized:
            edit(logits, numbers, numbers, tables.edits)
        sampler.sample(logits, numbers, tables, numbers, kind.full, out, kind.filtered)

    return step


def _slot_tables(kind: Kind, task: _Task, rank: int, device: Any) -> SlotTables:
    """Every slot with a request of the kind, as an engine would have it."""
    import torch

    from albireo.workers.engine.cuda.apply_plan import apply
    from albireo.workers.engine.cuda.edit_state import keep_edits
    from albireo.workers.engine.cuda.slot_tables import SlotTables

    most, width = max(task.batches), task.vocab // task.ranks
    tables = SlotTables(most, most, 64, 1024, 16, width, rank * width, device)
    for slot in range(most):
        plan = one_request(kind, slot, task.vocab)
        tables.words[: len(plan.words)] = torch.from_numpy(plan.words.copy())
        apply(tables)
        if kind.penalized:
            keep_edits(tables, plan, flagged_takes=True, counted=True)
    return tables


def _result(kind: Kind, batch: int, times: list[float]) -> dict[str, Any]:
    times = sorted(times)
    return {
        "kind": kind.name,
        "batch": batch,
        "us": round(statistics.median(times), 1),
        "us_p99": round(times[min(len(times) * 99 // 100, len(times) - 1)], 1),
    }


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
