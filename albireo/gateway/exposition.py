"""Writes metrics as Prometheus reads them (text format 0.0.4).

prometheus-client makes an object of each sample and each label of it, which took
2 ms for a node of two groups, on the gateway's event loop; this takes a sixth.
The tests read what it writes with prometheus-client's parser.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
PREFIX = "albireo:"


def labels(**values: str) -> str:
    """`name="value",...`, to be given to the methods below."""
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in values.items())


class Exposition:
    """Families of samples, each with (labels, value) pairs; one without samples is left out."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def gauge(self, name: str, text: str, samples: Iterable[tuple[str, float]]) -> None:
        self._family(name, "gauge", text, samples)

    def counter(self, name: str, text: str, samples: Iterable[tuple[str, float]]) -> None:
        """`name` without its `_total`."""
        self._family(f"{name}_total", "counter", text, samples)

    def histogram(
        self, name: str, text: str, samples: Iterable[tuple[str, Mapping[str, Any]]]
    ) -> None:
        """Histograms of the status tree: bounds, counts (one more: above all), and their sum."""
        lines: list[str] = []
        name = PREFIX + name
        for label, found in samples:
            total = 0
            for bound, count in zip((*found["bounds"], "+Inf"), found["counts"], strict=True):
                total += count
                lines.append(f'{name}_bucket{{{label},le="{bound}"}} {total}\n')
            lines.append(f"{name}_count{{{label}}} {total}\n{name}_sum{{{label}}} {found['sum']}\n")
        self._add(name, "histogram", text, lines)

    def text(self) -> bytes:
        return "".join(self._lines).encode()

    def _family(
        self, name: str, kind: str, text: str, samples: Iterable[tuple[str, float]]
    ) -> None:
        name = PREFIX + name
        lines = [f"{name}{{{label}}} {float(value)}\n" for label, value in samples]
        self._add(name, kind, text, lines)

    def _add(self, name: str, kind: str, text: str, lines: list[str]) -> None:
        if lines:
            self._lines.append(f"# HELP {name} {text}\n# TYPE {name} {kind}\n")
            self._lines += lines


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
