"""How long work takes on the GPU when it is replayed as a graph, as in a decode step."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch


def graph_us(
    work: Callable[[], object], device: torch.device, calls: int = 8, replays: int = 5
) -> float:
    """Microseconds of one call of `work`: the median of some replays of a graph of `calls`.

    Ranks whose work meets call it together.  PyTorch gives back the memory that it has cached.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # NCCL's own threads may call CUDA meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(calls):
                work()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        graph.replay()
        for event in events[:-1]:
            event.record(stream)
            graph.replay()
        events[-1].record(stream)
        stream.synchronize()
    torch.cuda.current_stream(device).wait_stream(stream)
    spans: list[float] = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))
    return spans[len(spans) // 2] * 1e3 / calls
