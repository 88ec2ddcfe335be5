"""`albireo bench serve`: load on an OpenAI-compatible server, and what its clients see.

datasets ── Asked ──▶ load (when, how many at once) ──▶ connection (HTTP, events)
                                 │ Answer
                                 ▼
                      figures (percentiles, goodput)
"""

from .connection import Target
from .datasets import DatasetError, DatasetOptions, make_requests, make_warm_ups
from .load import LoadOptions
from .run import Run, ServeOptions, bench_serve

__all__ = [
    "DatasetError",
    "DatasetOptions",
    "LoadOptions",
    "Run",
    "ServeOptions",
    "Target",
    "bench_serve",
    "make_requests",
    "make_warm_ups",
]
