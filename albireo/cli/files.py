"""Text of the files that options name."""

from __future__ import annotations

from pathlib import Path

import click


def text_of(path: str, option: str) -> str:
    """Raises BadParameter for a file that cannot be read, or is no UTF-8."""
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path} cannot be read: {error}", param_hint=option) from None
