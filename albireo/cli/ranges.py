"""Ranges of the options that are fields of NodeOptions: the command line has no others."""

from __future__ import annotations

import functools

import click
import msgspec

from albireo.node.options import NodeOptions

from .amounts import Amount


def range_of(field: str, least: float | None = None) -> click.IntRange | Amount:
    """The parameter type of a number of NodeOptions.  least: a higher bound below, for people."""
    kind = _kinds()[field]
    numbers = kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,)
    for number in numbers:
        if isinstance(number, msgspec.inspect.IntType):
            return click.IntRange(number.ge, number.le)
        if isinstance(number, msgspec.inspect.FloatType):
            if least is not None:
                return Amount(min=least, max=number.le)
            if number.gt is not None:
                return Amount(min=number.gt, max=number.le, min_open=True)
            return Amount(min=number.ge, max=number.le)
    raise TypeError(f"{field} is no number")


@functools.cache
def _kinds() -> dict[str, msgspec.inspect.Type]:
    info = msgspec.inspect.type_info(NodeOptions)
    assert isinstance(info, msgspec.inspect.StructType)
    return {field.name: field.type for field in info.fields}
