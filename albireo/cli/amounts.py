"""The parameter type of seconds, milliseconds, GiB and shares."""

from __future__ import annotations

import math
from typing import Any

import click


class Amount(click.FloatRange):
    """Numbers of a range, of which nan and, unless `endless`, inf, unlike for click, are none."""

    def __init__(self, *, endless: bool = False, **bounds: Any) -> None:
        super().__init__(**bounds)
        self._endless = endless

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = click.FLOAT.convert(value, param, ctx)
        if math.isnan(number) or (math.isinf(number) and not self._endless):
            wanted = "a number" if self._endless else "a finite number"
            self.fail(f"{value} is not {wanted}.", param, ctx)
        within: float = super().convert(number, param, ctx)
        return within
