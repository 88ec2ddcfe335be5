"""The parameter type of seconds, milliseconds and GiB."""

from __future__ import annotations

import math
from typing import Any

import click


class Amount(click.FloatRange):
    """Numbers of a range, of which inf and nan, unlike for click, are none."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number
